// linear_forward, which is a CPU's only.
#include <pybind11/stl.h>

#include "bindings.h"
#include "linear.h"

#ifndef LSPM_CUDA
namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

void linear_forward(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                    const OptionalView& scales, const TensorView& y, int threads) {
  check_first(x, "x");
  if (weight.dim() != 2 || weight.size(1) != x.size(-1)) TensorView::refuse("weight", "have x's columns");
  if (weight.size(1) > 1 && weight.stride(1) != 1) TensorView::refuse("weight", "have contiguous rows");
  const bool integers = weight.dtype() == DType::i8;
  if (!integers && weight.dtype() > DType::f16) TensorView::refuse("weight", "be of floats or int8");
  if (integers != bool(scales)) TensorView::refuse("scales", "be there exactly where weight is int8");
  const DType bias_dtype = bias ? bias->dtype() : DType::f32;
  if (bias_dtype != DType::f32 && bias_dtype != x.dtype())
    TensorView::refuse("bias", "have x's dtype or float32");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t rows = inputs ? x.numel() / inputs : outputs ? y.numel() / outputs : 0;
  const int64_t groups = scales ? scales->size(-1) : 1;
  if (groups < 1 || inputs % groups || (groups > 1 && inputs / groups % 32))
    TensorView::refuse("scales", "be of groups of a multiple of 32 columns");
  const lspm::LinearShape s{rows,      outputs,        inputs,    weight.stride(0), inputs / groups,
                            x.dtype(), weight.dtype(), bias_dtype};
  void *px = x.contiguous("x", x, s.dtype, rows * inputs), *pw = weight.data("weight", x, s.weight_dtype);
  void* pb = optional(bias, "bias", x, bias_dtype, outputs);
  auto* ps = static_cast<float*>(optional(scales, "scales", x, DType::f32, outputs * groups));
  void* out = y.contiguous("y", x, s.dtype, rows * outputs);
  py::gil_scoped_release unlocked;
  lspm::cpu::linear_forward(px, pw, pb, ps, out, s, threads);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias").none(true),
        py::arg("scales").none(true), py::arg("y"), py::arg("threads"));
}
#endif
