// attention_with_kv_cache_append, which the CPU has; the attention that follows is bindings_attention.cpp's.
#ifndef LSPM_CUDA
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "attention_with_kv_cache.h"
#include "bindings.h"

namespace py = pybind11;
using lspm::DType;
using lspm::HeadsView;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

// That the new keys lie in the cache and have an angle: positions rows of one. Messages as Python has them
// where it can read the counts.
void check_counts(const int32_t* counts, const HeadsView& cache, int64_t rows, int64_t batches,
                  int64_t positions, const lspm::AppendShape& s) {
  constexpr auto kName = "attention_with_kv_cache: cache_seqlens";
  // Not by cache.pages, which is null where a table has no columns.
  const int64_t places = cache.page_rows ? cache.page_columns * rows : rows;
  const int64_t last = positions - std::max(s.keys, s.steps ? s.queries : 1);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t first = counts[b] - s.keys;
    if (first < 0 || counts[b] > places)
      refuse_value(kName,
                   "be from 0 to the cache's room of " + std::to_string(places) + " less " +
                       std::to_string(s.keys) + " new keys",
                   first);
    if (s.half && first > last)
      refuse_value(kName, "be at most " + std::to_string(last) + " by the rows of cos", first);
    for (int64_t row = first; cache.pages && row < counts[b]; row = (row / rows + 1) * rows) {
      const int64_t page = cache.pages[b * cache.page_columns + row / rows];
      if (page < 0 || page >= batches)
        refuse_value("pages", "be at least 0 and below " + std::to_string(batches), page);
    }
  }
}

void append(const TensorView& q, const TensorView& k, const TensorView& v, const OptionalView& turned,
            const TensorView& k_cache, const TensorView& v_cache, const TensorView& counts,
            const OptionalView& pages, const OptionalView& cos, const OptionalView& sin, bool interleaved,
            bool steps, int threads) {
  check_first(q, "q");
  lspm::AppendShape s{q.size(0), q.size(1), k.size(1), q.size(2),  k.size(2),   q.size(3),
                      v.size(3), 0,         q.dtype(), DType::f32, interleaved, steps};
  int64_t positions = 0;
  if (cos) {
    positions = cos->size(0), s.half = cos->size(1), s.table_dtype = cos->dtype();
    if (cos->dim() != 2 || s.half < 1 || 2 * s.half > s.head_dim)
      TensorView::refuse("cos", "have rows of at most half of q's");
    if (s.table_dtype != DType::f32 && s.table_dtype != s.dtype)
      TensorView::refuse("cos", "have q's dtype or float32");
    if (!sin || !turned) TensorView::refuse("sin and turned", "be there where cos is");
  }
  const int64_t B = s.batch, H_kv = s.kv_heads, N = k_cache.size(0), rows = k_cache.size(2);
  const auto of = [&](const TensorView& x, const char* name, int64_t heads, int64_t rows, int64_t dim) {
    return heads_view(x, name, q, B, heads, rows, dim);
  };
  const HeadsView tq = of(q, "q", s.heads, s.queries, s.head_dim);
  const HeadsView tt = cos ? of(*turned, "turned", s.heads, s.queries, s.head_dim) : tq;
  const HeadsView tk = of(k, "k", H_kv, s.keys, s.head_dim), tv = of(v, "v", H_kv, s.keys, s.value_dim);
  HeadsView to_k = heads_view(k_cache, "k_cache", q, pages ? N : B, H_kv, rows, s.head_dim);
  HeadsView to_v = heads_view(v_cache, "v_cache", q, pages ? N : B, H_kv, rows, s.value_dim);
  if (pages && pages->dim() != 2) TensorView::refuse("pages", "have two dimensions");
  for (HeadsView* cache : {&to_k, &to_v}) {
    if (!pages) break;
    cache->page_rows = rows, cache->page_columns = pages->size(1);
    cache->pages =
        static_cast<const int32_t*>(pages->contiguous("pages", q, DType::i32, B * cache->page_columns));
  }
  const auto* pn = static_cast<const int32_t*>(counts.contiguous("counts", q, DType::i32, B));
  void* pc = optional(cos, "cos", q, s.table_dtype, positions * s.half);
  void* ps = optional(sin, "sin", q, s.table_dtype, positions * s.half);
  check_counts(pn, to_k, rows, N, positions, s);
  py::gil_scoped_release unlocked;
  lspm::cpu::attention_with_kv_cache_append(tq, tk, tv, tt, to_k, to_v, pn, pc, ps, s, threads);
}

}  // namespace

void bind_attention_with_kv_cache(py::module_& m) {
  using py::arg;
  const auto maybe = [](const char* name) { return py::arg(name).none(true); };
  m.def("attention_with_kv_cache_append", &append, arg("q"), arg("k"), arg("v"), maybe("turned"),
        arg("k_cache"), arg("v_cache"), arg("counts"), maybe("pages"), maybe("cos"), maybe("sin"),
        arg("interleaved"), arg("steps"), arg("threads"));
}
#endif
