// The Python face of the kernels: checks every view, releases the GIL, calls. Outputs are allocated in
// Python. Compiled twice, as bindings.h says, under the same names.
#include "bindings.h"

#include <pybind11/stl.h>

#include <utility>

#include "attention.h"
#include "cpu/isa.h"
#include "layer_norm.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

#ifdef LSPM_CUDA
#define MODULE_NAME _C_cuda
#else
#define MODULE_NAME _C
#endif

namespace {

void* optional(const OptionalView& view, const char* name, const TensorView& beside, DType dtype,
               int64_t elements) {
  return view ? view->contiguous(name, beside, dtype, elements) : nullptr;
}

// The shape of a call, from its (rows, cols) tensor and what it has of weight, bias or their gradients.
lspm::LayerNormShape layer_norm_shape(const TensorView& x, const OptionalView& weight,
                                      const OptionalView& bias, int64_t partials, bool centered) {
  check_first(x, "x");
  const int64_t cols = x.size(-1);
  const DType weight_dtype = weight ? weight->dtype() : bias ? bias->dtype() : DType::f32;
  if (weight_dtype != DType::f32 && weight_dtype != x.dtype())
    TensorView::refuse("weight", "have x's dtype or float32");
  return {cols ? x.numel() / cols : 0, cols, partials, x.dtype(), weight_dtype, centered};
}

// What the forward saves for the backward: (2, rows), the mean and rstd, or (1, rows), rstd alone in RMS
// norm.
struct Statistics {
  float *mean = nullptr, *rstd = nullptr;

  Statistics(const OptionalView& view, const TensorView& x, const lspm::LayerNormShape& s) {
    if (!view) return;
    rstd = static_cast<float*>(view->contiguous("statistics", x, DType::f32, (s.centered ? 2 : 1) * s.rows));
    if (s.centered) mean = std::exchange(rstd, rstd + s.rows);
  }
};

void layer_norm_forward(const TensorView& x, const OptionalView& residual, const OptionalView& weight,
                        const OptionalView& bias, const OptionalView& sum, const TensorView& y,
                        const OptionalView& statistics, float eps, bool centered,
                        [[maybe_unused]] int threads) {
  const auto s = layer_norm_shape(x, weight, bias, 0, centered);
  const int64_t n = s.rows * s.cols;
  void *px = x.contiguous("x", x, s.dtype, n), *pr = optional(residual, "residual", x, s.dtype, n);
  void* pw = optional(weight, "weight", x, s.weight_dtype, s.cols);
  void* pb = optional(bias, "bias", x, s.weight_dtype, s.cols);
  void *ps = optional(sum, "sum", x, s.dtype, n), *py = y.contiguous("y", x, s.dtype, n);
  const Statistics saved(statistics, x, s);
  if (!ps != !pr) TensorView::refuse("sum", "be there exactly where residual is");
  py::gil_scoped_release unlocked;
  backend::layer_norm_forward(px, pr, pw, pb, ps, py, saved.mean, saved.rstd, s, eps, WHERE(x, threads));
}

void layer_norm_backward(const TensorView& dy, const OptionalView& dsum, const TensorView& sum,
                         const TensorView& statistics, const OptionalView& weight, const TensorView& dx,
                         const OptionalView& dweight, const OptionalView& dbias, const TensorView& partial,
                         bool centered, [[maybe_unused]] int threads) {
  const auto s = layer_norm_shape(dy, weight ? weight : dweight, dbias, partial.size(0), centered);
  const int64_t n = s.rows * s.cols;
  void *pdy = dy.contiguous("dy", dy, s.dtype, n), *pds = optional(dsum, "dsum", dy, s.dtype, n);
  void* ps = sum.contiguous("sum", dy, s.dtype, n);
  const Statistics saved(statistics, dy, s);
  void *pw = optional(weight, "weight", dy, s.weight_dtype, s.cols),
       *pdx = dx.contiguous("dx", dy, s.dtype, n);
  void* pdw = optional(dweight, "dweight", dy, s.weight_dtype, s.cols);
  void* pdb = optional(dbias, "dbias", dy, s.weight_dtype, s.cols);
  auto* pp = static_cast<float*>(partial.contiguous("partial", dy, DType::f32, s.partials * 2 * s.cols));
  py::gil_scoped_release unlocked;
  backend::layer_norm_backward(pdy, pds, ps, saved.mean, saved.rstd, pw, pdx, pdw, pdb, pp, s,
                               WHERE(dy, threads));
}

#ifndef LSPM_CUDA
lspm::HeadsView heads_view(const TensorView& x, const char* name, const TensorView& q, int64_t batch,
                           int64_t heads, int64_t rows, int64_t dim) {
  if (x.dim() != 4 || x.size(0) != batch || x.size(1) != heads || x.size(2) != rows || x.size(3) != dim)
    TensorView::refuse(name, "have the shape that the contract names");
  if (dim > 1 && x.stride(3) != 1) TensorView::refuse(name, "have a contiguous last dimension");
  return {x.data(name, q, q.dtype()), x.stride(0), x.stride(1), x.stride(2)};
}

lspm::AttentionShape attention_shape(const TensorView& q, const TensorView& k, const TensorView& v,
                                     bool causal, float scale) {
  check_first(q, "q");
  const lspm::AttentionShape s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2),
                               q.size(3), v.size(3), q.dtype(), scale,     causal};
  if (s.head_dim < 1 || s.head_dim > 256 || s.value_dim < 1 || s.value_dim > 256)
    TensorView::refuse("q, k and v", "have 1 to 256 dims to a head");
  if (s.kv_heads < 1 || s.heads % s.kv_heads)
    TensorView::refuse("k", "have a number of heads that divides q's");
  return s;
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                       const TensorView& lse, bool causal, float scale, int threads) {
  const auto s = attention_shape(q, k, v, causal, scale);
  const auto tq = heads_view(q, "q", q, s.batch, s.heads, s.queries, s.head_dim);
  const auto tk = heads_view(k, "k", q, s.batch, s.kv_heads, s.keys, s.head_dim);
  const auto tv = heads_view(v, "v", q, s.batch, s.kv_heads, s.keys, s.value_dim);
  const auto to = heads_view(out, "out", q, s.batch, s.heads, s.queries, s.value_dim);
  auto* pl = static_cast<float*>(lse.contiguous("lse", q, DType::f32, s.batch * s.heads * s.queries));
  py::gil_scoped_release unlocked;
  backend::attention_forward(tq, tk, tv, to, pl, s, WHERE(q, threads));
}

void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& out, const TensorView& lse, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const TensorView& delta, bool causal,
                        float scale, int threads) {
  const auto s = attention_shape(q, k, v, causal, scale);
  const int64_t rows = s.batch * s.heads * s.queries;
  const auto of_queries = [&](const TensorView& x, const char* name, int64_t dim) {
    return heads_view(x, name, q, s.batch, s.heads, s.queries, dim);
  };
  const auto of_keys = [&](const TensorView& x, const char* name, int64_t dim) {
    return heads_view(x, name, q, s.batch, s.kv_heads, s.keys, dim);
  };
  const auto tdout = of_queries(dout, "dout", s.value_dim), tout = of_queries(out, "out", s.value_dim);
  const auto tq = of_queries(q, "q", s.head_dim), tdq = of_queries(dq, "dq", s.head_dim);
  const auto tk = of_keys(k, "k", s.head_dim), tdk = of_keys(dk, "dk", s.head_dim);
  const auto tv = of_keys(v, "v", s.value_dim), tdv = of_keys(dv, "dv", s.value_dim);
  const auto* pl = static_cast<const float*>(lse.contiguous("lse", q, DType::f32, rows));
  auto* pd = static_cast<float*>(delta.contiguous("delta", q, DType::f32, rows));
  py::gil_scoped_release unlocked;
  backend::attention_backward(tdout, tq, tk, tv, tout, pl, tdq, tdk, tdv, pd, s, WHERE(q, threads));
}
#endif

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  lspm::init_tensor_api();
#ifndef LSPM_CUDA
  if (!lspm::cpu::isa_request())
    throw py::import_error(std::string("the operating system does not grant ") + lspm::cpu::isa_name());
  m.attr("isa") = lspm::cpu::isa_name();
#endif
  m.def("layer_norm_forward", &layer_norm_forward, py::arg("x"), py::arg("residual").none(true),
        py::arg("weight").none(true), py::arg("bias").none(true), py::arg("sum").none(true), py::arg("y"),
        py::arg("statistics").none(true), py::arg("eps"), py::arg("centered"), py::arg("threads"));
  m.def("layer_norm_backward", &layer_norm_backward, py::arg("dy"), py::arg("dsum").none(true),
        py::arg("sum"), py::arg("statistics"), py::arg("weight").none(true), py::arg("dx"),
        py::arg("dweight").none(true), py::arg("dbias").none(true), py::arg("partial"), py::arg("centered"),
        py::arg("threads"));
#ifndef LSPM_CUDA
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
        py::arg("lse"), py::arg("causal"), py::arg("scale"), py::arg("threads"));
  m.def("attention_backward", &attention_backward, py::arg("dout"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("delta"),
        py::arg("causal"), py::arg("scale"), py::arg("threads"));
#endif
  bind_rotary(m);
}
