// Attention with online softmax (Dao, "FlashAttention-2", 2023), the forward; its backward is a file of its
// own.
//
// A thread owns up to kBlock queries of one head. It packs a tile of keys and values once for all of them,
// and for each kForwardQueries of them computes scores, softmax and the product with the values while these
// lie in the cache. Tiles that the window leaves nothing of are skipped, as are columns at a tile's ends.
// Nothing is ever as large as queries x keys.
#include "attention.h"

#include <cmath>
#include <memory>

#include "cpu/attention_tiles.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kForwardQueries = 32;  // queries in a tile: few, so that the mask wastes little
constexpr int64_t kBlock = 512;          // queries that share a packed tile of keys

template <class O>
struct ForwardScratch {
  alignas(64) O q[kBlock * kStride<O>];
  O k[kKeys * kMaxDim], v[kKeys * kMaxDim];  // right sides; k transposed
  float scores[kForwardQueries * kScores];
  O p[kForwardQueries * kStride<O>];
  float keep[kForwardQueries * kScores];  // what dropout multiplies p by
  float out[kBlock * kScores];
  float max[kBlock];   // of each row's scores so far
  double sum[kBlock];  // of their exponentials under that maximum
  RowBuffer rows;
};

// Columns [begin, end) of a tile, of which the rows see those before visible(r).
template <class Visible>
struct Columns {
  int64_t begin, end;
  Visible visible;
};
template <class Visible>
Columns(int64_t, int64_t, Visible) -> Columns<Visible>;

// Turns a tile of scores into p = exp(score * scale - max), 0 where a row does not see, and moves the maximum
// and the sum of each row, and what was summed for it so far, to the new maximum. Row by row each step would
// wait for the one before; so each step is taken for all rows.
template <bool kDropout, class O, class Visible>
void softmax_tile(ForwardScratch<O>& w, int64_t first, int64_t rows, const Columns<Visible>& columns,
                  int64_t value_dim, float scale) {
  float* max = w.max + first;
  double* sum = w.sum + first;
  alignas(64) float before[kForwardQueries], base[kForwardQueries], shrink[kForwardQueries];
  std::copy_n(max, rows, before);
  for (int64_t r = 0; r < rows; ++r) {
    const float* score = w.scores + r * kScores;
    F largest = broadcast(max[r]);
    const int64_t sees = columns.visible(r);
    for (int64_t n = columns.begin; n < sees; n += kLanes)
      largest = lspm::max(first_lanes(load(score + n) * scale, sees - n, largest), largest);
    max[r] = lspm::max(largest);
    base[r] = max[r] == -kInfinity ? 0.0f : max[r];  // all hidden so far: exp(-inf - 0) is 0
  }
  for (int64_t r = 0; r < rows; r += kLanes) store(shrink + r, exp(load(before + r) - load(base + r)));
  for (int64_t r = 0; r < rows; ++r) {
    const float *score = w.scores + r * kScores, *keep = w.keep + r * kScores;
    O* p = w.p + r * kStride<O>;
    const int64_t sees = columns.visible(r);
    WideSum total;
    int64_t n = columns.begin;
    const auto put = [&](F e) {
      total.add(n, e);
      store_left(p + n, kDropout ? e * load(keep + n) : e);
    };
    for (; n + kLanes <= sees; n += kLanes) put(exp(load(score + n) * scale - base[r]));
    for (; n < columns.end; n += kLanes)
      put(first_lanes(exp(load(score + n) * scale - base[r]), sees - n, F{}));
    if (max[r] == before[r]) {
      sum[r] += total.total();
      continue;
    }
    sum[r] = sum[r] * shrink[r] + total.total();
    float* out = w.out + (first + r) * kScores;
    for (int64_t d = 0; d < value_dim; d += kLanes) store(out + d, load(out + d) * shrink[r]);
  }
}

// Queries [begin, end) of one head.
template <class T, class O>
void forward_block(const ForwardViews& t, int64_t b, int64_t h, int64_t begin, int64_t end,
                   const AttentionShape& s, ForwardScratch<O>& w) {
  const int64_t kv = h / s.group(), count = end - begin, last_keys = s.end_key(end - 1);
  const int64_t k_panel = panel_size(s.head_dim), v_panel = panel_size(kKeys);
  const float scale = kScalesQueries<O> ? 1.0f : s.scale;
  pack_left(t.q.at<const T>(b, h, begin), t.q.row_stride, s.scale, w.q, count, s.head_dim);
  std::fill_n(w.max, count, -kInfinity);
  std::fill_n(w.sum, count, 0.0);
  for (int64_t r = 0; r < count; ++r) std::fill_n(w.out + r * kScores, s.value_dim, 0.0f);
  for (int64_t key = s.first_key(begin) / kKeys * kKeys; key < last_keys; key += kKeys) {
    const int64_t keys = std::min(kKeys, last_keys - key);
    const auto k = w.rows.template rows<T>(t.k, b, kv, key, keys, s.head_dim);
    pack_right_transposed(k.data, k.stride, w.k, k_panel, s.head_dim, keys);
    const auto v = w.rows.template rows<T>(t.v, b, kv, key, keys, s.value_dim);
    pack_right(v.data, v.stride, w.v, v_panel, keys, s.value_dim);
    for (int64_t i = 0; i < count; i += kForwardQueries) {
      const int64_t rows = std::min(kForwardQueries, count - i);
      const int64_t to = std::min(keys, s.end_key(begin + i + rows - 1) - key);
      const int64_t from = first_column(s, begin + i, key);
      if (from >= to) continue;
      multiply(w.q + i * kStride<O>, w.k + from / kPanel * k_panel, k_panel, w.scores + from, kScores, rows,
               to - from, s.head_dim, false);
      const ScoresTile tile{b, h, begin + i, key, rows, to};
      const bool extras = has_extras(tile, s, t.extras);
      if (extras) add_extras(w.scores, nullptr, kScores, tile, scale, s, t.extras);
      if (s.dropout > 0) draw_dropout(w.keep, kScores, tile, s);
      const Columns columns{from, round_up(to, kTileDepth<O>),
                            [&](int64_t r) { return std::min(to, s.end_key(begin + i + r) - key); }};
      (s.dropout > 0 ? softmax_tile<true, O, decltype(columns.visible)>
                     : softmax_tile<false, O, decltype(columns.visible)>)(w, i, rows, columns, s.value_dim,
                                                                          extras ? 1.0f : scale);
      multiply(w.p + from, w.v + from * kPanel, v_panel, w.out + i * kScores, kScores, rows, s.value_dim,
               to - from, true);
    }
  }
  for (int64_t r = 0; r < count; ++r)
    finish_row<T>(t, s, b, h, begin + r, w.max[r], w.sum[r], w.out + r * kScores);
}

template <class T>
void forward(const ForwardViews& t, const AttentionShape& all, int threads) {
  using Scratch = ForwardScratch<OperandOf<T>>;
  const int64_t blocks = (all.queries + kBlock - 1) / kBlock, items = all.batch * all.heads * blocks;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[std::max(threads, 1)]);
  parallel_claim(items, all.batch * all.heads * all.queries * all.keys, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    for (int64_t item; (item = next()) < items;) {
      const int64_t block = blocks - 1 - item % blocks;  // the longest first, where attention is causal
      const int64_t head = item / blocks, begin = block * kBlock;
      const AttentionShape s = all.of(head / all.heads);
      if (begin < s.queries)
        forward_block<T>(t, head / s.heads, head % s.heads, begin, std::min(s.queries, begin + kBlock), s,
                         scratch[thread]);
    }
  });
}

}  // namespace

void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const AttentionExtras& extras, const HeadsView& out, float* lse, float* statistics,
                       const AttentionShape& s, int threads) {
  const ForwardViews t{q, k, v, extras, out, lse, statistics};
  if (s.queries <= kFewQueries && !statistics) return attention_decode(t, s, threads);
  with_type(s, [&](auto type) { forward<decltype(type)>(t, s, threads); });
}

}  // namespace lspm::cpu
