// attention_forward and attention_backward: dense, packed and paged.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "attention.h"
#include "bindings.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

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

using Scalars = std::tuple<float, float, double>;                        // scale, softcap, dropout
using AttentionWindow = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // left, right, shift, seed
// query_starts, key_starts, key_counts, pages; the longest queries and keys. None: all sequences are as long.
using Sequences =
    std::optional<std::tuple<OptionalView, OptionalView, OptionalView, OptionalView, int64_t, int64_t>>;

// What a call is, and where its keys lie.
struct AttentionCall {
  lspm::AttentionShape shape;
  const int32_t *starts = nullptr, *pages = nullptr;
  bool paged = false;  // pages is null where they are none
  int64_t key_batches, page_columns = 0;

  AttentionCall(const TensorView& q, const TensorView& k, const TensorView& v, const Sequences& sequences,
                const AttentionWindow& window, const Scalars& scalars);

  lspm::HeadsView of_queries(const TensorView& x, const char* name, const TensorView& q, int64_t dim) const {
    const bool packed = shape.query_starts;
    lspm::HeadsView view = heads_view(x, name, q, packed ? 1 : shape.batch, shape.heads,
                                      packed ? shape.packed : shape.queries, dim);
    view.starts = shape.query_starts;
    if (packed) view.batch_stride = 0;
    return view;
  }
  lspm::HeadsView of_keys(const TensorView& x, const char* name, const TensorView& q, int64_t rows,
                          int64_t dim) const {
    lspm::HeadsView view = heads_view(x, name, q, key_batches, shape.kv_heads, rows, dim);
    view.starts = starts;
    view.pages = pages;
    view.page_rows = pages ? rows : 0;
    view.page_columns = page_columns;
    if (shape.key_starts) view.batch_stride = 0;
    return view;
  }

 private:
  void set_sequences(const Sequences& sequences, const TensorView& q, const TensorView& k);
};

AttentionCall::AttentionCall(const TensorView& q, const TensorView& k, const TensorView& v,
                             const Sequences& sequences, const AttentionWindow& window,
                             const Scalars& scalars) {
  check_first(q, "q");
  const auto [left, right, shift, seed] = window;
  const auto [scale, softcap, dropout] = scalars;
  shape = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3),     q.dtype(),
           left,      right,     shift,     scale,     softcap,   dropout,   uint64_t(seed)};
  if (shape.head_dim < 1 || shape.head_dim > 256 || shape.value_dim < 1 || shape.value_dim > 256)
    TensorView::refuse("q, k and v", "have 1 to 256 dims to a head");
  if (shape.kv_heads < 1 || shape.heads % shape.kv_heads)
    TensorView::refuse("k", "have a number of heads that divides q's");
  if (!(dropout >= 0 && dropout < 1)) TensorView::refuse("dropout", "be at least 0 and below 1");
  key_batches = shape.batch;
  if (sequences) set_sequences(sequences, q, k);
}

#ifndef LSPM_CUDA
void check_starts(const char* name, const int32_t* starts, int64_t batch, int64_t longest, int64_t rows) {
  if (starts[0] != 0) refuse_value(name, "begin with 0", starts[0]);
  for (int64_t b = 0; b < batch; ++b) {
    if (starts[b + 1] < starts[b]) refuse_value(name, "not decrease", starts[b + 1]);
    if (starts[b + 1] - starts[b] > longest)
      refuse_value(name, "be at most the longest sequence, " + std::to_string(longest) + ", apart",
                   starts[b + 1] - starts[b]);
  }
  if (starts[batch] != rows)
    refuse_value(name, "end with the number of rows, " + std::to_string(rows), starts[batch]);
}

// That each key of a cache lies in it: k is (batch or pages, kv_heads, rows, dim).
void check_cache(const AttentionCall& call, const TensorView& k) {
  const auto& s = call.shape;
  const int64_t rows = k.size(2);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t begin = call.starts ? call.starts[b] : 0, count = s.key_counts[b];
    const int64_t places = call.paged ? call.page_columns * rows : rows;
    if (begin < 0) refuse_value("key_starts", "be at least 0", begin);
    if (count < 0 || count > s.keys || begin + count > places)
      refuse_value("key_counts", "be at least 0 and within the cache", count);
    for (int64_t row = begin; call.pages && row < begin + count; row = (row / rows + 1) * rows) {
      const int64_t page = call.pages[b * call.page_columns + row / rows];
      if (page < 0 || page >= k.size(0))
        refuse_value("pages", "be at least 0 and below " + std::to_string(k.size(0)), page);
    }
  }
}
#endif

void AttentionCall::set_sequences(const Sequences& sequences, const TensorView& q, const TensorView& k) {
  const auto& [query_starts, key_starts, key_counts, page_table, queries, keys] = *sequences;
  const auto of = [&](const OptionalView& view, const char* name, int64_t elements) {
    return static_cast<const int32_t*>(optional(view, name, q, DType::i32, elements));
  };
  if (query_starts) {
    if (q.size(0) != 1) TensorView::refuse("q", "have a batch of 1 where sequences are packed");
    shape.batch = key_batches = query_starts->numel() - 1;
    if (shape.batch < 0) TensorView::refuse("query_starts", "have at least one element");
    shape.packed = q.size(2);
  }
  shape.queries = queries;
  shape.keys = keys;
  shape.query_starts = of(query_starts, "query_starts", shape.batch + 1);
  shape.key_counts = of(key_counts, "key_counts", shape.batch);
  starts = of(key_starts, "key_starts", shape.batch + (key_counts ? 0 : 1));
  if (!key_counts) shape.key_starts = starts;
  if (page_table) {
    if (!key_counts || page_table->dim() != 2)
      TensorView::refuse("pages", "have key_counts and two dimensions");
    paged = true;
    page_columns = page_table->size(1);
    if (key_starts && page_columns != 1)
      TensorView::refuse("key_starts", "be None where a sequence has several pages");
    pages = of(page_table, "pages", shape.batch * page_columns);
    key_batches = k.size(0);
  } else if (!key_counts) {
    if (!starts) TensorView::refuse("key_starts", "be there where key_counts are not");
    key_batches = 1;
  }
#ifndef LSPM_CUDA
  if (query_starts) check_starts("query_starts", shape.query_starts, shape.batch, queries, shape.packed);
  if (key_counts)
    check_cache(*this, k);
  else
    check_starts("key_starts", starts, shape.batch, keys, k.size(2));
#endif
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                       const OptionalView& bias, const OptionalView& mask, const OptionalView& slopes,
                       const OptionalView& sinks, const TensorView& out, const TensorView& lse,
                       const OptionalView& statistics, const Sequences& sequences,
                       const AttentionWindow& window, const Scalars& scalars, [[maybe_unused]] int threads,
                       const OptionalView& scratch) {
  const AttentionCall call(q, k, v, sequences, window, scalars);
  const auto& s = call.shape;
  const auto tq = call.of_queries(q, "q", q, s.head_dim), to = call.of_queries(out, "out", q, s.value_dim);
  const auto tk = call.of_keys(k, "k", q, k.size(2), s.head_dim);
  const auto tv = call.of_keys(v, "v", q, k.size(2), s.value_dim);
  const auto extras = attention_extras(q, bias, mask, slopes, sinks, s);
  auto* pl = static_cast<float*>(lse.contiguous("lse", q, DType::f32, s.rows()));
  auto* ps = static_cast<float*>(optional(statistics, "statistics", q, DType::f32, 2 * s.rows()));
  const int64_t splits = scratch ? scratch->size(0) : 1;
  [[maybe_unused]] auto* part =
      optional(scratch, "scratch", q, DType::f32, splits * s.rows() * (s.value_dim + 2));
  py::gil_scoped_release unlocked;
#ifdef LSPM_CUDA
  backend::attention_forward(tq, tk, tv, extras, to, pl, ps, static_cast<float*>(part), splits, s,
                             WHERE(q, threads));
#else
  backend::attention_forward(tq, tk, tv, extras, to, pl, ps, s, threads);
#endif
}

void attention_backward(const TensorView& dout, const OptionalView& dlse, const TensorView& q,
                        const TensorView& k, const TensorView& v, const OptionalView& bias,
                        const OptionalView& mask, const OptionalView& slopes, const OptionalView& sinks,
                        const TensorView& out, const TensorView& statistics, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const OptionalView& dbias,
                        const TensorView& delta, const Sequences& sequences, const AttentionWindow& window,
                        const Scalars& scalars, [[maybe_unused]] int threads) {
  const AttentionCall call(q, k, v, sequences, window, scalars);
  const auto& s = call.shape;
  if (s.key_counts) TensorView::refuse("key_counts", "be None, as a cache has no gradient");
  const int64_t D = s.head_dim, Dv = s.value_dim, keys = k.size(2);
  const auto tdout = call.of_queries(dout, "dout", q, Dv), tout = call.of_queries(out, "out", q, Dv);
  const auto tq = call.of_queries(q, "q", q, D), tdq = call.of_queries(dq, "dq", q, D);
  const auto tk = call.of_keys(k, "k", q, keys, D), tdk = call.of_keys(dk, "dk", q, keys, D);
  const auto tv = call.of_keys(v, "v", q, keys, Dv), tdv = call.of_keys(dv, "dv", q, keys, Dv);
  const auto extras = attention_extras(q, bias, mask, slopes, sinks, s);
  const auto tdbias = scores_view(dbias, "dbias", q, s, {DType::f32});
  if (tdbias.data && !tdbias.key_stride && s.keys > 1)
    TensorView::refuse("dbias", "have a gradient for each key");
  if (tdbias.data && kDeviceType != 1) TensorView::refuse("dbias", "be None");
  const auto* pdl = static_cast<const float*>(optional(dlse, "dlse", q, DType::f32, s.rows()));
  const auto* ps =
      static_cast<const float*>(statistics.contiguous("statistics", q, DType::f32, 2 * s.rows()));
  auto* pd = static_cast<float*>(delta.contiguous("delta", q, DType::f32, 2 * s.rows()));
  py::gil_scoped_release unlocked;
#ifdef LSPM_CUDA
  backend::attention_backward(tdout, pdl, tq, tk, tv, extras, tout, ps, tdq, tdk, tdv, pd, s, WHERE(q, 0));
#else
  backend::attention_backward(tdout, pdl, tq, tk, tv, extras, tout, ps, tdq, tdk, tdv, tdbias, pd, s,
                              threads);
#endif
}

}  // namespace

void bind_attention(py::module_& m) {
  using py::arg;
  const auto maybe = [](const char* name) { return py::arg(name).none(true); };
  m.def("attention_forward", &attention_forward, arg("q"), arg("k"), arg("v"), maybe("bias"), maybe("mask"),
        maybe("slopes"), maybe("sinks"), arg("out"), arg("lse"), maybe("statistics"), maybe("sequences"),
        arg("window"), arg("scalars"), arg("threads"), maybe("scratch") = py::none());
  m.def("attention_backward", &attention_backward, arg("dout"), maybe("dlse"), arg("q"), arg("k"), arg("v"),
        maybe("bias"), maybe("mask"), maybe("slopes"), maybe("sinks"), arg("out"), arg("statistics"),
        arg("dq"), arg("dk"), arg("dv"), maybe("dbias"), arg("delta"), maybe("sequences"), arg("window"),
        arg("scalars"), arg("threads"));
}
