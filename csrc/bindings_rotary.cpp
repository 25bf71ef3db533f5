// rotary_forward and rotary_backward: one kernel, which turns by the angle or by its negative.
#include <pybind11/stl.h>

#include <string>

#include "bindings.h"
#include "rotary.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

lspm::RotaryShape shape_of(const TensorView& x, const TensorView& cos, int64_t offset, bool interleaved,
                           bool inverse) {
  check_first(x, "x");
  if (x.dim() != 4) TensorView::refuse("x", "have 4 dimensions");
  if (x.size(3) > 1 && x.stride(3) != 1) TensorView::refuse("x", "have a contiguous last dimension");
  if (cos.dim() != 2 || 2 * cos.size(1) > x.size(3))
    TensorView::refuse("cos", "have rows of at most half of x's");
  if (cos.dtype() != DType::f32 && cos.dtype() != x.dtype())
    TensorView::refuse("cos", "have x's dtype or float32");
  return {x.size(0),   x.size(1),   x.size(2), x.size(3), cos.size(1), cos.size(0), x.stride(0),
          x.stride(1), x.stride(2), offset,    x.dtype(), cos.dtype(), interleaved, inverse};
}

#ifndef LSPM_CUDA
void check_offsets(const int64_t* offsets, int64_t count, const lspm::RotaryShape& s) {
  const int64_t last = s.positions - s.rows;
  for (int64_t i = 0; i < count; ++i)
    if (offsets[i] < 0 || offsets[i] > last)
      throw std::invalid_argument("rotary: offsets must lie in 0 to S - T = " + std::to_string(last) +
                                  ", got " + std::to_string(offsets[i]));
}
#endif

template <bool kInverse>
void rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, const OptionalView& offsets,
            const TensorView& out, int64_t offset, bool interleaved, [[maybe_unused]] int threads) {
  const auto s = shape_of(x, cos, offset, interleaved, kInverse);
  const int64_t table = s.positions * s.half;
  void* px = x.data("x", x, s.dtype);
  void *pc = cos.contiguous("cos", x, s.table_dtype, table),
       *ps = sin.contiguous("sin", x, s.table_dtype, table);
  void* po = out.contiguous("out", x, s.dtype, s.elements());
  const auto* starts =
      offsets ? static_cast<const int64_t*>(offsets->contiguous("offsets", x, DType::i64, s.batch)) : nullptr;
#ifndef LSPM_CUDA
  if (starts)
    check_offsets(starts, s.batch, s);
  else
    check_offsets(&offset, 1, s);
#endif
  py::gil_scoped_release unlocked;
  backend::rotary(px, pc, ps, starts, po, s, WHERE(x, threads));
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def("rotary_forward", &rotary<false>, py::arg("x"), py::arg("cos"), py::arg("sin"),
        py::arg("offsets").none(true), py::arg("out"), py::arg("offset"), py::arg("interleaved"),
        py::arg("threads"));
  m.def("rotary_backward", &rotary<true>, py::arg("dout"), py::arg("cos"), py::arg("sin"),
        py::arg("offsets").none(true), py::arg("dx"), py::arg("offset"), py::arg("interleaved"),
        py::arg("threads"));
}
