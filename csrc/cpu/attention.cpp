// Attention with online softmax (Dao, "FlashAttention-2", 2023), forward and backward.
//
// Forward: a thread owns up to kBlock queries of one head. It packs a tile of keys and values once for all of
// them, and for each kQueries of them computes scores, softmax and the product with the values while these
// lie in the cache. Backward: a thread owns a tile of keys of one key head and goes through the queries that
// see it, so that dk and dv stay in scratch; dq is summed in floats, where the key tiles of a head take turns
// in their order, so that its bits depend on no schedule. Tiles that the mask leaves nothing of are skipped,
// in the last tile that a query sees also columns. Nothing is ever as large as queries x keys; arithmetic and
// sums are in float.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kKeys = 128;  // keys in a tile
constexpr int64_t kForwardQueries =
    32;                           // queries in a tile of the forward: few, so that the mask wastes little
constexpr int64_t kBlock = 256;   // queries that share a packed tile of keys
constexpr int64_t kQueries = 64;  // queries in a tile of the backward: the depth of the sums in dk and dv
constexpr int64_t kMaxDim = kMaxDepth;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t panel_of(int64_t depth) { return round_up(depth, kLanes) * kPanel; }

// ---
struct ForwardScratch {
  alignas(64) float q[kBlock * kStride<float>];
  float k[kKeys * kMaxDim], v[kKeys * kMaxDim];  // right sides; k transposed
  float scores[kForwardQueries * kStride<float>];
  float out[kBlock * kStride<float>];
  float max[kBlock], sum[kBlock];  // of each row so far
};

// Turns a row of scores into exp(score - max), updates max and sum, and gives the factor by which what was
// summed before must shrink. The row sees its first `visible` columns; the others become 0.
float softmax_row(float* row, int64_t visible, int64_t columns, float& max, float& sum) {
  F largest = broadcast(-kInfinity);
  for (int64_t n = 0; n < visible; n += kLanes)
    largest = lspm::max(first_lanes(load(row + n), visible - n, broadcast(-kInfinity)), largest);
  const float before = max, after = std::max(before, lspm::max(largest));
  F total{};
  for (int64_t n = 0; n < columns; n += kLanes) {
    const F p = first_lanes(exp(load(row + n) - after), visible - n, F{});
    total += p;
    store(row + n, p);
  }
  const float shrink = before == after ? 1.0f : exp(broadcast(before - after))[0];
  max = after;
  sum = sum * shrink + lspm::sum(total);
  return shrink;
}

// Queries [begin, end) of one head.
template <class T>
void forward_block(const T* q, const T* k, const T* v, T* out, float* lse, int64_t begin, int64_t end,
                   const HeadsView& q_view, const HeadsView& k_view, const HeadsView& v_view,
                   const HeadsView& out_view, const AttentionShape& s, ForwardScratch& w) {
  const int64_t count = end - begin, last_keys = s.visible_keys(end - 1);
  const int64_t k_panel = panel_of(s.head_dim), v_panel = panel_of(kKeys);
  pack_left(q + begin * q_view.row_stride, q_view.row_stride, s.scale, w.q, count, s.head_dim);
  std::fill_n(w.max, count, -kInfinity);
  std::fill_n(w.sum, count, 0.0f);
  for (int64_t r = 0; r < count; ++r) std::fill_n(w.out + r * kStride<float>, s.value_dim, 0.0f);
  for (int64_t key = 0; key < last_keys; key += kKeys) {
    const int64_t keys = std::min(kKeys, last_keys - key);
    pack_right_transposed(k + key * k_view.row_stride, k_view.row_stride, w.k, k_panel, s.head_dim, keys);
    pack_right(v + key * v_view.row_stride, v_view.row_stride, w.v, v_panel, keys, s.value_dim);
    for (int64_t i = 0; i < count; i += kForwardQueries) {
      const int64_t rows = std::min(kForwardQueries, count - i);
      const int64_t columns = std::min(keys, s.visible_keys(begin + i + rows - 1) - key);
      if (columns <= 0) continue;
      float* sums = w.out + i * kStride<float>;
      multiply<false>(w.q + i * kStride<float>, w.k, k_panel, w.scores, kStride<float>, rows, columns,
                      s.head_dim, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = std::min(columns, s.visible_keys(begin + i + r) - key);
        float* row = w.scores + r * kStride<float>;
        if (visible <= 0) {
          std::fill_n(row, columns, 0.0f);
          continue;
        }
        const float shrink = softmax_row(row, visible, columns, w.max[i + r], w.sum[i + r]);
        if (shrink == 1.0f) continue;
        float* total = sums + r * kStride<float>;
        for (int64_t d = 0; d < s.value_dim; d += kLanes) store(total + d, load(total + d) * shrink);
      }
      multiply<false>(w.scores, w.v, v_panel, sums, kStride<float>, rows, s.value_dim, columns, true);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const bool sees = s.visible_keys(begin + r) > 0;
    lse[begin + r] = sees ? w.max[r] + std::log(w.sum[r]) : -kInfinity;
    const float factor = sees ? 1.0f / w.sum[r] : 0.0f;
    for_each_vector(s.value_dim, [&](int64_t d, auto lanes) {
      lanes.store(out + (begin + r) * out_view.row_stride + d, load(w.out + r * kStride<float> + d) * factor);
    });
  }
}

template <class T>
void forward(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out, float* lse,
             const AttentionShape& s, int threads) {
  const int64_t blocks = (s.queries + kBlock - 1) / kBlock, items = s.batch * s.heads * blocks;
  const std::unique_ptr<ForwardScratch[]> scratch(new ForwardScratch[std::max(threads, 1)]);
  parallel_claim(items, s.batch * s.heads * s.queries * s.keys, threads, [&](auto next, int thread) {
    for (int64_t item; (item = next()) < items;) {
      const int64_t block = blocks - 1 - item % blocks;  // the longest first, where attention is causal
      const int64_t b = item / blocks / s.heads, h = item / blocks % s.heads, kv = h / s.group();
      forward_block(q.at<const T>(b, h), k.at<const T>(b, kv), v.at<const T>(b, kv), out.at<T>(b, h),
                    lse + (b * s.heads + h) * s.queries, block * kBlock,
                    std::min(s.queries, (block + 1) * kBlock), q, k, v, out, s, scratch[thread]);
    }
  });
}

// ---
struct BackwardScratch {
  alignas(64) float q[kQueries * kStride<float>], dout[kQueries * kStride<float>];
  float k_transposed[kKeys * kMaxDim], v_transposed[kKeys * kMaxDim], k[kKeys * kMaxDim];  // right sides
  float scores[kQueries * kStride<float>], dscores[kQueries * kStride<float>];
  float p[kQueries * kKeys], ds[kQueries * kKeys];                   // right sides
  float dk[kMaxDim * kStride<float>], dv[kMaxDim * kStride<float>];  // transposed: (dim, keys)
};

// Turns a tile of scores and of dp = dout v^T into p and ds = p * (dp - delta).
void probabilities(BackwardScratch& w, const float* lse, const float* delta, int64_t first_query,
                   int64_t first_key, int64_t rows, int64_t columns, const AttentionShape& s) {
  const auto right = [](float* side, int64_t r, int64_t n) {
    return side + n / kPanel * (kQueries * kPanel) + r * kPanel + n % kPanel;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t sees = s.visible_keys(first_query + r), visible = std::min(columns, sees - first_key);
    const float* score = w.scores + r * kStride<float>;
    float* dscore = w.dscores + r * kStride<float>;
    F dots{};
    for (int64_t n = 0; n < columns; n += kLanes) {
      const F p = visible > n ? first_lanes(exp(load(score + n) - lse[r]), visible - n, F{}) : F{};
      dots += first_lanes(p * load(dscore + n), visible - n, F{});
      store(right(w.p, r, n), p);
    }
    // The same dot product as delta, but it shares dp's rounding errors, which then cancel: a query that sees
    // a single key has exactly ds = 0. It can be had where all keys of the query lie in this tile.
    const float dot = first_key == 0 && sees <= columns ? sum(dots) : delta[r];
    for (int64_t n = 0; n < columns; n += kLanes) {
      const F ds = first_lanes(load(right(w.p, r, n)) * (load(dscore + n) - dot), visible - n, F{});
      store(right(w.ds, r, n), ds);
      store(dscore + n, ds);
    }
  }
}

// Where the key tiles of a head stand: key tile j adds to query tile i of dq when turn i is j.
struct Turns {
  std::vector<std::atomic<int64_t>> turns;
  explicit Turns(int64_t n) : turns(n) {}
  void wait(int64_t i, int64_t turn) const {
    while (turns[i].load(std::memory_order_acquire) != turn) std::this_thread::yield();
  }
  void pass(int64_t i) { turns[i].fetch_add(1, std::memory_order_release); }
};

template <class T>
void write_row(T* to, const float* from, int64_t dims, float scale) {
  for_each_vector(dims, [&](int64_t d, auto lanes) { lanes.store(to + d, load(from + d) * scale); });
}

// Rows [0, rows) of `to` from the columns of `from`.
template <class T>
void write_transposed(T* to, int64_t stride, const float* from, int64_t rows, int64_t dims) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for_each_vector(dims, [&](int64_t d, auto lanes) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (d + i) * kStride<float> + r);
      transpose(block);
      for (int i = 0; i < std::min<int64_t>(kLanes, rows - r); ++i)
        lanes.store(to + (r + i) * stride + d, block[i]);
    });
}

struct BackwardViews {
  const HeadsView &dout, &q, &k, &v, &dq, &dk, &dv;
};

// Keys [key, key + kKeys) of one key head. dq_sums: (group, queries rounded up to kQueries, row).
template <class T>
void backward_tile(const BackwardViews& t, const float* lse, const float* delta, float* dq_sums,
                   int64_t dq_row, Turns& turns, int64_t first_turn, int64_t b, int64_t kv, int64_t key,
                   const AttentionShape& s, BackwardScratch& w) {
  const int64_t keys = std::min(kKeys, s.keys - key), tiles = (s.queries + kQueries - 1) / kQueries;
  const int64_t qk_panel = panel_of(s.head_dim), v_panel = panel_of(s.value_dim), k_panel = panel_of(kKeys);
  const int64_t p_panel = kQueries * kPanel;
  pack_right_transposed(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k_transposed, qk_panel, s.head_dim,
                        keys);
  pack_right_transposed(t.v.at<const T>(b, kv, key), t.v.row_stride, w.v_transposed, v_panel, s.value_dim,
                        keys);
  pack_right(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k, k_panel, keys, s.head_dim);
  std::fill_n(w.dk, s.head_dim * kStride<float>, 0.0f);
  std::fill_n(w.dv, s.value_dim * kStride<float>, 0.0f);
  for (int64_t item = 0; item < s.group() * tiles; ++item) {
    const int64_t h = kv * s.group() + item / tiles, i = item % tiles * kQueries;
    const int64_t rows = std::min(kQueries, s.queries - i), sees = s.visible_keys(i + rows - 1);
    const int64_t columns = std::min(keys, sees - key), row = (b * s.heads + h) * s.queries + i;
    if (columns <= 0) {
      if (key == 0)
        for (int64_t r = 0; r < rows; ++r) std::fill_n(t.dq.at<T>(b, h, i + r), s.head_dim, T{});
      continue;
    }
    pack_left(t.q.at<const T>(b, h, i), t.q.row_stride, s.scale, w.q, rows, s.head_dim);
    pack_left(t.dout.at<const T>(b, h, i), t.dout.row_stride, 1.0f, w.dout, rows, s.value_dim);
    multiply<false>(w.q, w.k_transposed, qk_panel, w.scores, kStride<float>, rows, columns, s.head_dim,
                    false);
    multiply<false>(w.dout, w.v_transposed, v_panel, w.dscores, kStride<float>, rows, columns, s.value_dim,
                    false);
    probabilities(w, lse + row, delta + row, i, key, rows, columns, s);
    multiply<true>(w.dout, w.p, p_panel, w.dv, kStride<float>, s.value_dim, columns, rows, true);
    multiply<true>(w.q, w.ds, p_panel, w.dk, kStride<float>, s.head_dim, columns, rows, true);

    float* sums = dq_sums + item * kQueries * dq_row;
    turns.wait(first_turn + item, key / kKeys);
    multiply<false>(w.dscores, w.k, k_panel, sums, dq_row, rows, s.head_dim, columns, key > 0);
    if (key + kKeys >= sees)
      for (int64_t r = 0; r < rows; ++r)
        write_row(t.dq.at<T>(b, h, i + r), sums + r * dq_row, s.head_dim, s.scale);
    turns.pass(first_turn + item);
  }
  write_transposed(t.dk.at<T>(b, kv, key), t.dk.row_stride, w.dk, keys, s.head_dim);
  write_transposed(t.dv.at<T>(b, kv, key), t.dv.row_stride, w.dv, keys, s.value_dim);
}

template <class T>
void row_dots(const HeadsView& dout, const HeadsView& out, float* delta, const AttentionShape& s,
              int threads) {
  const int64_t rows = s.batch * s.heads * s.queries;
  parallel_for(rows, rows * s.value_dim, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / s.queries / s.heads, h = row / s.queries % s.heads, i = row % s.queries;
      const T *x = dout.at<const T>(b, h, i), *y = out.at<const T>(b, h, i);
      delta[row] =
          sum_of(s.value_dim, [&](int64_t d, auto lanes) { return lanes.load(x + d) * lanes.load(y + d); });
    }
  });
}

template <class T>
void backward(const BackwardViews& t, const HeadsView& out, const float* lse, float* delta,
              const AttentionShape& s, int threads) {
  row_dots<T>(t.dout, out, delta, s, threads);
  // At least one tile, which zeroes dq where there are no keys.
  const int64_t key_tiles = std::max<int64_t>(1, (s.keys + kKeys - 1) / kKeys);
  const int64_t query_tiles = s.group() * ((s.queries + kQueries - 1) / kQueries);
  const int64_t heads = s.batch * s.kv_heads, dq_row = round_up(s.head_dim, kLanes);
  // A thread takes all key tiles of a head where there are heads enough to go round, else one tile at a time.
  // The tiles are then handed out in order, so that whatever a tile waits for has begun.
  const bool whole = heads >= 4 * threads;
  const int64_t claims = whole ? heads : heads * key_tiles, slots = whole ? std::max(threads, 1) : heads;
  const int64_t dq_size = query_tiles * kQueries * dq_row;
  const std::unique_ptr<BackwardScratch[]> scratch(new BackwardScratch[std::max(threads, 1)]);
  const std::unique_ptr<float[]> dq_sums(new float[slots * dq_size]);
  Turns turns(slots * query_tiles);
  parallel_claim(claims, s.batch * s.heads * s.queries * s.keys, threads, [&](auto next, int thread) {
    for (int64_t claim; (claim = next()) < claims;) {
      const int64_t head = whole ? claim : claim / key_tiles, slot = whole ? thread : head;
      const int64_t first = whole ? 0 : claim % key_tiles, last = whole ? key_tiles : first + 1;
      if (whole)
        for (int64_t i = 0; i < query_tiles; ++i) turns.turns[slot * query_tiles + i] = 0;
      for (int64_t tile = first; tile < last; ++tile)
        backward_tile<T>(t, lse, delta, dq_sums.get() + slot * dq_size, dq_row, turns, slot * query_tiles,
                         head / s.kv_heads, head % s.kv_heads, tile * kKeys, s, scratch[thread]);
    }
  });
}

}  // namespace

void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                       float* lse, const AttentionShape& s, int threads) {
  switch (s.dtype) {
    case DType::f32:
      return forward<float>(q, k, v, out, lse, s, threads);
    case DType::bf16:
      return forward<bf16>(q, k, v, out, lse, s, threads);
    default:
      return forward<f16>(q, k, v, out, lse, s, threads);
  }
}

void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                        const HeadsView& out, const float* lse, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, float* delta, const AttentionShape& s, int threads) {
  const BackwardViews t{dout, q, k, v, dq, dk, dv};
  switch (s.dtype) {
    case DType::f32:
      return backward<float>(t, out, lse, delta, s, threads);
    case DType::bf16:
      return backward<bf16>(t, out, lse, delta, s, threads);
    default:
      return backward<f16>(t, out, lse, delta, s, threads);
  }
}

}  // namespace lspm::cpu
