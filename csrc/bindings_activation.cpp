// bias_act and swiglu, which the CPU has: on a GPU they are Triton's.
#ifndef LSPM_CUDA
#include <pybind11/stl.h>

#include "bias_act.h"
#include "bindings.h"
#include "swiglu.h"

namespace py = pybind11;
using lspm::Activation;
using lspm::BiasActShape;
using lspm::DType;
using lspm::OptionalView;
using lspm::Rows;
using lspm::SwigluShape;
using lspm::TensorView;

namespace {

Activation activation_of(int number, Activation least) {
  const auto activation = static_cast<Activation>(number);
  if (number == int(Activation::relu6) || activation < least || activation > Activation::gelu_tanh)
    refuse_value("activation", "be one that the contract names", number);
  return activation;
}

BiasActShape bias_act_shape(const TensorView& x, const OptionalView& bias, int64_t partials, int activation) {
  check_first(x, "x");
  const int64_t cols = x.size(-1);
  const DType bias_dtype = bias ? bias->dtype() : x.dtype();
  if (bias_dtype != DType::f32 && bias_dtype != x.dtype())
    TensorView::refuse("bias", "have x's dtype or float32");
  return {cols ? x.numel() / cols : 0,
          cols,
          partials,
          x.dtype(),
          bias_dtype,
          activation_of(activation, Activation::relu)};
}

void bias_act_forward(const TensorView& x, const OptionalView& bias, const TensorView& y, int activation,
                      int threads) {
  const auto s = bias_act_shape(x, bias, 0, activation);
  const int64_t n = s.rows * s.cols;
  void *px = x.contiguous("x", x, s.dtype, n), *py = y.contiguous("y", x, s.dtype, n);
  void* pb = optional(bias, "bias", x, s.bias_dtype, s.cols);
  py::gil_scoped_release unlocked;
  lspm::cpu::bias_act_forward(px, pb, py, s, threads);
}

void bias_act_backward(const TensorView& dy, const TensorView& x, const OptionalView& bias,
                       const TensorView& dx, const OptionalView& dbias, const OptionalView& y,
                       const OptionalView& partial, int activation, int threads) {
  const auto s = bias_act_shape(x, bias, partial ? partial->size(0) : 0, activation);
  const int64_t n = s.rows * s.cols;
  void *pdy = dy.contiguous("dy", x, s.dtype, n), *px = x.contiguous("x", x, s.dtype, n);
  void *pb = optional(bias, "bias", x, s.bias_dtype, s.cols), *pdx = dx.contiguous("dx", x, s.dtype, n);
  void *pdb = optional(dbias, "dbias", x, s.bias_dtype, s.cols), *py = optional(y, "y", x, s.dtype, n);
  auto* pp = static_cast<float*>(optional(partial, "partial", x, DType::f32, s.partials * s.cols));
  if (dbias && (!bias || !s.partials)) TensorView::refuse("dbias", "come with bias and partial");
  py::gil_scoped_release unlocked;
  lspm::cpu::bias_act_backward(pdy, px, pb, pdx, pdb, py, pp, s, threads);
}

// x as rows of `cols` elements from column `first` on: what lies before its last dimension must be one
// dimension's worth of strides.
Rows rows_of(const TensorView& x, const char* name, const TensorView& gate, const SwigluShape& s,
             int64_t first) {
  const int last = x.dim() - 1;
  int64_t elements = x.size(last), stride = 0;
  bool apart = false;
  if (x.numel() != s.rows * elements || elements < first + s.cols)
    TensorView::refuse(name, "have another number of elements");
  for (int d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (!apart) stride = elements = x.stride(d), apart = true;
    if (x.stride(d) != elements) TensorView::refuse(name, "have rows that lie equally far apart");
    elements *= x.size(d);
  }
  if (x.size(last) > 1 && x.stride(last) != 1) TensorView::refuse(name, "have a contiguous last dimension");
  auto* const data = static_cast<char*>(x.data(name, gate, s.dtype));
  return {data + first * (s.dtype == DType::f32 ? 4 : 2), apart ? stride : s.cols};
}

// The two halves of a packed tensor, or two tensors.
struct Halves {
  Rows gate, up;
  Halves(const TensorView& g, const OptionalView& u, const char* name, const char* up_name,
         const TensorView& beside, const SwigluShape& s)
      : gate(rows_of(g, name, beside, s, 0)),
        up(u ? rows_of(*u, up_name, beside, s, 0) : rows_of(g, name, beside, s, s.cols)) {
    const int64_t size = u ? s.cols : 2 * s.cols;
    if (g.size(-1) != size) TensorView::refuse(name, "have another number of columns");
  }
};

SwigluShape swiglu_shape(const TensorView& gate, const OptionalView& up, int activation) {
  check_first(gate, "gate");
  const int64_t cols = gate.size(-1);
  return {cols ? gate.numel() / cols : 0, up ? cols : cols / 2, gate.dtype(),
          activation_of(activation, Activation::silu)};
}

void swiglu_forward(const TensorView& gate, const OptionalView& up, const TensorView& y, int activation,
                    int threads) {
  const auto s = swiglu_shape(gate, up, activation);
  const Halves given(gate, up, "gate", "up", gate, s);
  void* py = y.contiguous("y", gate, s.dtype, s.rows * s.cols);
  py::gil_scoped_release unlocked;
  lspm::cpu::swiglu_forward(given.gate, given.up, py, s, threads);
}

void swiglu_backward(const TensorView& dy, const TensorView& gate, const OptionalView& up,
                     const TensorView& dgate, const OptionalView& dup, const OptionalView& y, int activation,
                     int threads) {
  const auto s = swiglu_shape(gate, up, activation);
  const int64_t n = s.rows * s.cols;
  if (!up != !dup) TensorView::refuse("dup", "be there exactly where up is");
  const Halves given(gate, up, "gate", "up", gate, s), wanted(dgate, dup, "dgate", "dup", gate, s);
  void *pdy = dy.contiguous("dy", gate, s.dtype, n), *py = optional(y, "y", gate, s.dtype, n);
  py::gil_scoped_release unlocked;
  lspm::cpu::swiglu_backward(pdy, given.gate, given.up, wanted.gate, wanted.up, py, s, threads);
}

}  // namespace

void bind_activation(py::module_& m) {
  m.def("bias_act_forward", &bias_act_forward, py::arg("x"), py::arg("bias").none(true), py::arg("y"),
        py::arg("activation"), py::arg("threads"));
  m.def("bias_act_backward", &bias_act_backward, py::arg("dy"), py::arg("x"), py::arg("bias").none(true),
        py::arg("dx"), py::arg("dbias").none(true), py::arg("y").none(true), py::arg("partial").none(true),
        py::arg("activation"), py::arg("threads"));
  m.def("swiglu_forward", &swiglu_forward, py::arg("gate"), py::arg("up").none(true), py::arg("y"),
        py::arg("activation"), py::arg("threads"));
  m.def("swiglu_backward", &swiglu_backward, py::arg("dy"), py::arg("gate"), py::arg("up").none(true),
        py::arg("dgate"), py::arg("dup").none(true), py::arg("y").none(true), py::arg("activation"),
        py::arg("threads"));
}
#endif
