// max_pool2d and global_avg_pool: images lie as (N, H, W, C), contiguous.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "global_avg_pool.h"
#include "max_pool2d.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

using PoolWindow =
    std::array<int64_t, 8>;  // kernel, stride, padding and dilation, each of rows and of columns

lspm::MaxPool2dShape shape_of(const TensorView& x, const char* x_name, const TensorView& y,
                              const char* y_name, const PoolWindow& w) {
  check_first(x, x_name);
  for (const auto& [view, name] : {std::pair{&x, x_name}, std::pair{&y, y_name}})
    if (view->dim() != 4) TensorView::refuse(name, "have 4 dimensions");
  for (int i = 0; i < 8; ++i)
    if (w[i] < (i / 2 != 2)) TensorView::refuse("window", "be of positive sizes and padding from 0 on");
  const lspm::MaxPool2dShape s{x.size(0),
                               x.size(3),
                               {x.size(1), y.size(1), w[0], w[2], w[4], w[6]},
                               {x.size(2), y.size(2), w[1], w[3], w[5], w[7]},
                               x.dtype()};
  if (y.size(0) != s.batch || y.size(3) != s.channels) TensorView::refuse(y_name, "have x's images");
  return s;
}

DType type_of_positions(const lspm::MaxPool2dShape& s) { return s.bytes() ? DType::u8 : DType::i32; }

void max_pool2d_forward(const TensorView& x, const TensorView& y, const OptionalView& positions,
                        const PoolWindow& window, [[maybe_unused]] int threads) {
  const auto s = shape_of(x, "x", y, "y", window);
  void *px = x.contiguous("x", x, s.dtype, s.inputs()), *py = y.contiguous("y", x, s.dtype, s.outputs());
  void* pp = optional(positions, "positions", x, type_of_positions(s), s.outputs());
  py::gil_scoped_release unlocked;
  backend::max_pool2d_forward(px, py, pp, s, WHERE(x, threads));
}

void max_pool2d_backward(const TensorView& dy, const TensorView& positions, const TensorView& dx,
                         const PoolWindow& window, [[maybe_unused]] int threads) {
  const auto s = shape_of(dx, "dx", dy, "dy", window);
  void* pdy = dy.contiguous("dy", dx, s.dtype, s.outputs());
  void* pp = positions.contiguous("positions", dx, type_of_positions(s), s.outputs());
  void* pdx = dx.contiguous("dx", dx, s.dtype, s.inputs());
  py::gil_scoped_release unlocked;
  backend::max_pool2d_backward(pdy, pp, pdx, s, WHERE(dx, threads));
}

lspm::GlobalAvgPoolShape shape_of(const TensorView& x, const char* name) {
  check_first(x, name);
  if (x.dim() != 4) TensorView::refuse(name, "have 4 dimensions");
  return {x.size(0), x.size(1) * x.size(2), x.size(3), x.dtype()};
}

void global_avg_pool_forward(const TensorView& x, const TensorView& y, [[maybe_unused]] int threads) {
  const auto s = shape_of(x, "x");
  void* px = x.contiguous("x", x, s.dtype, s.batch * s.pixels * s.channels);
  void* py = y.contiguous("y", x, s.dtype, s.batch * s.channels);
  py::gil_scoped_release unlocked;
  backend::global_avg_pool_forward(px, py, s, WHERE(x, threads));
}

void global_avg_pool_backward(const TensorView& dy, const TensorView& dx, [[maybe_unused]] int threads) {
  const auto s = shape_of(dx, "dx");
  void* pdy = dy.contiguous("dy", dx, s.dtype, s.batch * s.channels);
  void* pdx = dx.contiguous("dx", dx, s.dtype, s.batch * s.pixels * s.channels);
  py::gil_scoped_release unlocked;
  backend::global_avg_pool_backward(pdy, pdx, s, WHERE(dx, threads));
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("max_pool2d_forward", &max_pool2d_forward, py::arg("x"), py::arg("y"),
        py::arg("positions").none(true), py::arg("window"), py::arg("threads"));
  m.def("max_pool2d_backward", &max_pool2d_backward, py::arg("dy"), py::arg("positions"), py::arg("dx"),
        py::arg("window"), py::arg("threads"));
  m.def("global_avg_pool_forward", &global_avg_pool_forward, py::arg("x"), py::arg("y"), py::arg("threads"));
  m.def("global_avg_pool_backward", &global_avg_pool_backward, py::arg("dy"), py::arg("dx"),
        py::arg("threads"));
}
