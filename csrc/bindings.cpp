// The Python face of the kernels: checks every view, releases the GIL, calls. Outputs are allocated in
// Python. Compiled twice, as bindings.h says, under the same names.
#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
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

// `dtypes` of what may broadcast over (batch, heads, queries, keys).
lspm::ScoresView scores_view(const OptionalView& view, const char* name, const TensorView& q,
                             const lspm::AttentionShape& s, std::initializer_list<DType> dtypes) {
  if (!view) return {nullptr, 0, 0, 0, 0, DType::f32};
  const int64_t sizes[] = {s.batch, s.heads, s.queries, s.keys};
  int64_t strides[4];
  if (view->dim() != 4) TensorView::refuse(name, "have four dimensions");
  for (int d = 0; d < 4; ++d) {
    if (view->size(d) != 1 && view->size(d) != sizes[d]) TensorView::refuse(name, "broadcast to the scores");
    strides[d] = view->size(d) == 1 ? 0 : view->stride(d);
  }
  if (std::find(dtypes.begin(), dtypes.end(), view->dtype()) == dtypes.end())
    TensorView::refuse(name, "have a dtype that the contract names");
  return {view->data(name, q, view->dtype()), strides[0], strides[1], strides[2], strides[3], view->dtype()};
}

lspm::AttentionExtras attention_extras(const TensorView& q, const OptionalView& bias,
                                       const OptionalView& mask, const OptionalView& slopes,
                                       const OptionalView& sinks, const lspm::AttentionShape& s) {
  const auto of = [&](const OptionalView& view, const char* name, std::initializer_list<DType> dtypes) {
    return scores_view(view, name, q, s, dtypes);
  };
  return {of(bias, "bias", {DType::f32, s.dtype}), of(mask, "mask", {DType::f32, s.dtype, DType::b8}),
          of(slopes, "slopes", {DType::f32}),
          static_cast<const float*>(optional(sinks, "sinks", q, DType::f32, s.heads))};
}

// scale, softcap, dropout.
using Scalars = std::tuple<float, float, double>;
// left, right, shift, seed.
using Window = std::tuple<int64_t, int64_t, int64_t, int64_t>;

lspm::AttentionShape attention_shape(const TensorView& q, const TensorView& k, const TensorView& v,
                                     const Window& window, const Scalars& scalars) {
  check_first(q, "q");
  const auto [left, right, shift, seed] = window;
  const auto [scale, softcap, dropout] = scalars;
  const lspm::AttentionShape s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2),
                               q.size(3), v.size(3), q.dtype(), left,      right,
                               shift,     scale,     softcap,   dropout,   uint64_t(seed)};
  if (s.head_dim < 1 || s.head_dim > 256 || s.value_dim < 1 || s.value_dim > 256)
    TensorView::refuse("q, k and v", "have 1 to 256 dims to a head");
  if (s.kv_heads < 1 || s.heads % s.kv_heads)
    TensorView::refuse("k", "have a number of heads that divides q's");
  if (!(dropout >= 0 && dropout < 1)) TensorView::refuse("dropout", "be at least 0 and below 1");
  return s;
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                       const OptionalView& bias, const OptionalView& mask, const OptionalView& slopes,
                       const OptionalView& sinks, const TensorView& out, const TensorView& lse,
                       const OptionalView& statistics, const Window& window, const Scalars& scalars,
                       int threads) {
  const auto s = attention_shape(q, k, v, window, scalars);
  const auto tq = heads_view(q, "q", q, s.batch, s.heads, s.queries, s.head_dim);
  const auto tk = heads_view(k, "k", q, s.batch, s.kv_heads, s.keys, s.head_dim);
  const auto tv = heads_view(v, "v", q, s.batch, s.kv_heads, s.keys, s.value_dim);
  const auto to = heads_view(out, "out", q, s.batch, s.heads, s.queries, s.value_dim);
  const auto extras = attention_extras(q, bias, mask, slopes, sinks, s);
  auto* pl = static_cast<float*>(lse.contiguous("lse", q, DType::f32, s.batch * s.heads * s.queries));
  auto* ps = static_cast<float*>(
      optional(statistics, "statistics", q, DType::f32, 2 * s.batch * s.heads * s.queries));
  py::gil_scoped_release unlocked;
  backend::attention_forward(tq, tk, tv, extras, to, pl, ps, s, WHERE(q, threads));
}

void attention_backward(const TensorView& dout, const OptionalView& dlse, const TensorView& q,
                        const TensorView& k, const TensorView& v, const OptionalView& bias,
                        const OptionalView& mask, const OptionalView& slopes, const OptionalView& sinks,
                        const TensorView& out, const TensorView& statistics, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const OptionalView& dbias,
                        const TensorView& delta, const Window& window, const Scalars& scalars, int threads) {
  const auto s = attention_shape(q, k, v, window, scalars);
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
  const auto extras = attention_extras(q, bias, mask, slopes, sinks, s);
  const auto tdbias = scores_view(dbias, "dbias", q, s, {DType::f32});
  if (tdbias.data && !tdbias.key_stride && s.keys > 1)
    TensorView::refuse("dbias", "have a gradient for each key");
  const auto* pdl = static_cast<const float*>(optional(dlse, "dlse", q, DType::f32, rows));
  const auto* ps = static_cast<const float*>(statistics.contiguous("statistics", q, DType::f32, 2 * rows));
  auto* pd = static_cast<float*>(delta.contiguous("delta", q, DType::f32, rows));
  py::gil_scoped_release unlocked;
  backend::attention_backward(tdout, pdl, tq, tk, tv, extras, tout, ps, tdq, tdk, tdv, tdbias, pd, s,
                              WHERE(q, threads));
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
  const auto arg = [](const char* name) { return py::arg(name); };
  const auto maybe = [](const char* name) { return py::arg(name).none(true); };
  m.def("attention_forward", &attention_forward, arg("q"), arg("k"), arg("v"), maybe("bias"), maybe("mask"),
        maybe("slopes"), maybe("sinks"), arg("out"), arg("lse"), maybe("statistics"), arg("window"),
        arg("scalars"), arg("threads"));
  m.def("attention_backward", &attention_backward, arg("dout"), maybe("dlse"), arg("q"), arg("k"), arg("v"),
        maybe("bias"), maybe("mask"), maybe("slopes"), maybe("sinks"), arg("out"), arg("statistics"),
        arg("dq"), arg("dk"), arg("dv"), maybe("dbias"), arg("delta"), arg("window"), arg("scalars"),
        arg("threads"));
#endif
  bind_rotary(m);
}
