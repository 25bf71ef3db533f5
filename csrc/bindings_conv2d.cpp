// conv2d_forward and conv2d_backward. Tensors come as views (N, H, W, C); weight as torch has it.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "conv2d.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

using Pair = std::array<int64_t, 2>;
using Geometry = std::tuple<Pair, Pair, Pair, int64_t>;  // stride, padding, dilation, groups

lspm::Conv2dShape shape_of(const TensorView& x, const TensorView& weight, const TensorView& y,
                           const Geometry& geometry) {
  check_first(x, "x");
  for (const auto& [view, name] : {std::pair{x, "x"}, {weight, "weight"}, {y, "y"}})
    if (view.dim() != 4) TensorView::refuse(name, "have 4 dimensions");
  const auto& [stride, padding, dilation, groups] = geometry;
  if (groups < 1 || x.size(3) != weight.size(1) * groups || weight.size(0) % groups)
    TensorView::refuse("groups", "divide the channels and the filters");
  if (y.size(0) != x.size(0) || y.size(3) != weight.size(0))
    TensorView::refuse("y", "have x's batch and weight's filters");
  for (int i = 0; i < 2; ++i)
    if (stride[i] < 1 || padding[i] < 0 || dilation[i] < 1)
      TensorView::refuse("stride, padding and dilation", "be positive");
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          y.size(1),
          y.size(2),
          y.size(3),
          weight.size(2),
          weight.size(3),
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          dilation[0],
          dilation[1],
          groups,
          {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
          x.dtype()};
}

void conv2d_forward(const TensorView& x, const TensorView& weight, const OptionalView& scale,
                    const OptionalView& shift, const OptionalView& residual, const TensorView& y,
                    const OptionalView& statistics, const Geometry& geometry, int activation,
                    [[maybe_unused]] int threads, const OptionalView& packed) {
  const auto s = shape_of(x, weight, y, geometry);
  void *px = x.contiguous("x", x, s.dtype, x.numel()), *py = y.contiguous("y", x, s.dtype, y.numel());
  void* pw = weight.data("weight", x, s.dtype);
  if (activation < 0 || activation > int(lspm::Activation::gelu))
    TensorView::refuse("activation", "be one of the enumeration");
  const lspm::Conv2dEpilogue epilogue{
      static_cast<const float*>(optional(scale, "scale", x, DType::f32, s.filters)),
      static_cast<const float*>(optional(shift, "shift", x, DType::f32, s.filters)),
      optional(residual, "residual", x, s.dtype, y.numel()), lspm::Activation(activation)};
  [[maybe_unused]] auto* found =
      static_cast<float*>(optional(statistics, "statistics", x, DType::f32, 2 * s.filters));
#ifdef LSPM_CUDA
  void* scratch = optional(packed, "packed", x, s.dtype, s.packed_forward());
#else
  const void* scratch =
      packed ? packed->contiguous("packed", x, DType::u8, backend::conv2d_packed_bytes(s)) : nullptr;
#endif
  py::gil_scoped_release unlocked;
#ifdef LSPM_CUDA
  if (found) TensorView::refuse("statistics", "be None: batch_norm_act_statistics takes them");
  if (!scratch) TensorView::refuse("packed", "be there");
  backend::conv2d_forward(px, pw, epilogue, py, scratch, s, WHERE(x, threads));
#else
  backend::conv2d_forward(px, pw, scratch, epilogue, py, found, s, threads);
#endif
}

#ifndef LSPM_CUDA
// How the weight is packed depends on everything but the images' size.
lspm::Conv2dShape shape_of(const TensorView& weight, const Geometry& geometry) {
  check_first(weight, "weight");
  if (weight.dim() != 4) TensorView::refuse("weight", "have 4 dimensions");
  int64_t sizes[4] = {1, 1, 1, weight.size(1) * std::get<3>(geometry)}, strides[4] = {1, 1, 1, 1};
  int64_t out_sizes[4] = {1, 1, 1, weight.size(0)};
  TensorView x = weight, y = weight;
  x.t.shape = sizes, y.t.shape = out_sizes, x.t.strides = y.t.strides = strides;
  return shape_of(x, weight, y, geometry);
}

int64_t conv2d_packed_bytes(const TensorView& weight, const Geometry& geometry) {
  return backend::conv2d_packed_bytes(shape_of(weight, geometry));
}

void conv2d_pack(const TensorView& weight, const TensorView& packed, const Geometry& geometry, int threads) {
  const auto s = shape_of(weight, geometry);
  void* to = packed.contiguous("packed", weight, DType::u8, backend::conv2d_packed_bytes(s));
  void* from = weight.data("weight", weight, s.dtype);
  py::gil_scoped_release unlocked;
  backend::conv2d_pack(from, to, s, threads);
}
#endif

void conv2d_backward(const TensorView& dz, const TensorView& x, const TensorView& weight,
                     const OptionalView& dx, const OptionalView& dweight, const Geometry& geometry,
                     [[maybe_unused]] int threads, const OptionalView& packed, const OptionalView& partial) {
  const auto s = shape_of(x, weight, dz, geometry);
  void *pdz = dz.contiguous("dz", x, s.dtype, dz.numel()), *px = x.contiguous("x", x, s.dtype, x.numel());
  void *pw = weight.data("weight", x, s.dtype), *pdx = optional(dx, "dx", x, s.dtype, x.numel());
  void* pdw = dweight ? dweight->data("dweight", x, s.dtype) : nullptr;
  for (int d = 0; dweight && d < 4; ++d)
    if (dweight->dim() != 4 || dweight->size(d) != weight.size(d) || dweight->stride(d) != weight.stride(d))
      TensorView::refuse("dweight", "lie as weight does");
  [[maybe_unused]] void* scratch = optional(packed, "packed", x, s.dtype, s.packed_backward());
  [[maybe_unused]] const int64_t partials = partial ? partial->size(0) : 0;
  [[maybe_unused]] auto* sums =
      static_cast<float*>(optional(partial, "partial", x, DType::f32, partials * weight.numel()));
  py::gil_scoped_release unlocked;
#ifdef LSPM_CUDA
  if ((pdx && !scratch) || (pdw && !sums)) TensorView::refuse("packed and partial", "be there");
  backend::conv2d_backward(pdz, px, pw, pdx, pdw, scratch, sums, partials, s, WHERE(x, threads));
#else
  backend::conv2d_backward(pdz, px, pw, pdx, pdw, s, threads);
#endif
}

}  // namespace

void bind_conv2d(py::module_& m) {
  m.def("conv2d_forward", &conv2d_forward, py::arg("x"), py::arg("weight"), py::arg("scale").none(true),
        py::arg("shift").none(true), py::arg("residual").none(true), py::arg("y"),
        py::arg("statistics").none(true), py::arg("geometry"), py::arg("activation"), py::arg("threads"),
        py::arg("packed").none(true) = py::none());
#ifndef LSPM_CUDA
  m.def("conv2d_packed_bytes", &conv2d_packed_bytes, py::arg("weight"), py::arg("geometry"));
  m.def("conv2d_pack", &conv2d_pack, py::arg("weight"), py::arg("packed"), py::arg("geometry"),
        py::arg("threads"));
#endif
  m.def("conv2d_backward", &conv2d_backward, py::arg("dz"), py::arg("x"), py::arg("weight"),
        py::arg("dx").none(true), py::arg("dweight").none(true), py::arg("geometry"), py::arg("threads"),
        py::arg("packed").none(true) = py::none(), py::arg("partial").none(true) = py::none());
}
