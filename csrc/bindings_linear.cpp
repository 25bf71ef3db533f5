// linear_forward and matmul, which are a CPU's only.
#include <pybind11/stl.h>

#include "bindings.h"
#include "linear.h"
#include "matmul.h"

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
  const lspm::LinearShape s{rows,   outputs,   inputs,         weight.stride(0),
                            groups, x.dtype(), weight.dtype(), bias_dtype};
  void *px = x.contiguous("x", x, s.dtype, rows * inputs), *pw = weight.data("weight", x, s.weight_dtype);
  void* pb = optional(bias, "bias", x, bias_dtype, outputs);
  auto* ps = static_cast<float*>(optional(scales, "scales", x, DType::f32, outputs * groups));
  void* out = y.contiguous("y", x, s.dtype, rows * outputs);
  py::gil_scoped_release unlocked;
  lspm::cpu::linear_forward(px, pw, pb, ps, out, s, threads);
}

template <class T>
lspm::MatrixView<T> matrix_view(const TensorView& x, const char* name, const TensorView& beside) {
  if (x.dim() != 2) TensorView::refuse(name, "have 2 dimensions");
  if (x.size(1) > 1 && x.stride(1) != 1 && x.size(0) > 1 && x.stride(0) != 1)
    TensorView::refuse(name, "have a dimension that is contiguous");
  constexpr DType kDType = std::is_same_v<T, float> ? DType::f32 : DType::bf16;
  auto* data = static_cast<T*>(x.data(name, beside, kDType));
  return {data, x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

template <class T, class C, class Call>
void multiply(const TensorView& a, const TensorView& b, const OptionalView& bias, const TensorView& c,
              bool accumulate, int threads, Call call) {
  const auto pa = matrix_view<T>(a, "a", a), pb = matrix_view<T>(b, "b", a);
  const auto pc = matrix_view<C>(c, "c", a);
  if (pb.rows != pa.cols) TensorView::refuse("b", "have a row for each column of a");
  if (pc.rows != pa.rows || pc.cols != pb.cols) TensorView::refuse("c", "have the product's shape");
  if (pc.cols > 1 && pc.col_stride != 1) TensorView::refuse("c", "have a contiguous last dimension");
  if (bias && accumulate) TensorView::refuse("bias", "be None where c is added to");
  const auto* from = static_cast<float*>(optional(bias, "bias", a, DType::f32, pc.cols));
  py::gil_scoped_release unlocked;
  call(pa, pb, from, pc, accumulate, threads);
}

void matmul(const TensorView& a, const TensorView& b, const OptionalView& bias, const TensorView& c,
            bool accumulate, int threads) {
  using lspm::bf16, lspm::cpu::matmul_bf16;
  check_first(a, "a");
  if (a.dtype() != DType::bf16)
    multiply<float, float>(a, b, bias, c, accumulate, threads, &lspm::cpu::matmul);
  else if (c.dtype() == DType::f32)
    multiply<bf16, float>(a, b, bias, c, accumulate, threads, &matmul_bf16<float>);
  else
    multiply<bf16, bf16>(a, b, bias, c, accumulate, threads, &matmul_bf16<bf16>);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias").none(true),
        py::arg("scales").none(true), py::arg("y"), py::arg("threads"));
  m.def("matmul", &matmul, py::arg("a"), py::arg("b"), py::arg("bias").none(true), py::arg("c"),
        py::arg("accumulate"), py::arg("threads"));
}
#endif
