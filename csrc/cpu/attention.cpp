// Attention with online softmax (Dao, "FlashAttention-2", 2023), forward and backward.
//
// Forward: a thread owns up to kBlock queries of one head. It packs a tile of keys and values once for all of
// them, and for each kForwardQueries of them computes scores, softmax and the product with the values while
// these lie in the cache. Backward: a thread owns a tile of keys of one key head and goes through the queries
// that see it, so that dk and dv stay in scratch; dq is summed in floats, where the key tiles of a head take
// turns in their order, so that its bits depend on no schedule. Tiles that the mask leaves nothing of are
// skipped, and in the last tile that a query sees the columns it does not see. Nothing is ever as large as
// queries x keys.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kKeys = 256;            // keys in a tile: many, which spares passes over queries and sums
constexpr int64_t kForwardQueries = 32;   // queries in a tile: few, so that the mask wastes little
constexpr int64_t kBackwardQueries = 64;  // the same; here they are the depth of the sums in dk and dv too
constexpr int64_t kBlock = 256;           // queries of the forward that share a packed tile of keys
constexpr int64_t kMaxDim = kMaxDepth;
constexpr int64_t kScores = kStride<float>;  // elements from row to row of all that is float in scratch
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Whether q is multiplied by the scale as it is packed; bf16 would round it again, so there the scores are.
template <class O>
constexpr bool kScalesQueries = std::is_same_v<O, float>;

template <class O>
struct ForwardScratch {
  alignas(64) O q[kBlock * kStride<O>];
  O k[kKeys * kMaxDim], v[kKeys * kMaxDim];  // right sides; k transposed
  float scores[kForwardQueries * kScores];
  O p[kForwardQueries * kStride<O>];
  float out[kBlock * kScores];
  float max[kBlock], sum[kBlock];  // of each row so far
};

// Turns a tile of scores into p = exp(score * scale - max), 0 where the mask leaves nothing, and moves the
// maximum and the sum of each row, and what was summed for it so far, to the new maximum. `visible(r)` is how
// many of the columns row r sees. Row by row each step would wait for the one before; so each step is taken
// for all rows.
template <class O, class Visible>
void softmax_tile(ForwardScratch<O>& w, int64_t first, int64_t rows, int64_t columns, int64_t value_dim,
                  float scale, Visible visible) {
  float *max = w.max + first, *sum = w.sum + first, shrink[kForwardQueries];
  alignas(64) float before[kForwardQueries];
  std::copy_n(max, rows, before);
  for (int64_t r = 0; r < rows; ++r) {
    const float* score = w.scores + r * kScores;
    F largest = broadcast(max[r]);
    const int64_t sees = visible(r);
    for (int64_t n = 0; n < sees; n += kLanes)
      largest = lspm::max(first_lanes(load(score + n) * scale, sees - n, largest), largest);
    max[r] = lspm::max(largest);
  }
  for (int64_t r = 0; r < rows; r += kLanes) store(shrink + r, exp(load(before + r) - load(max + r)));
  for (int64_t r = 0; r < rows; ++r) {
    const float* score = w.scores + r * kScores;
    O* p = w.p + r * kStride<O>;
    const int64_t sees = visible(r);
    F total{};
    int64_t n = 0;
    for (; n + kLanes <= sees; n += kLanes) {
      const F e = exp(load(score + n) * scale - max[r]);
      total += e;
      store_left(p + n, e);
    }
    for (; n < columns; n += kLanes) {
      const F e = first_lanes(exp(load(score + n) * scale - max[r]), sees - n, F{});
      total += e;
      store_left(p + n, e);
    }
    if (max[r] == before[r]) {
      sum[r] += lspm::sum(total);
      continue;
    }
    sum[r] = sum[r] * shrink[r] + lspm::sum(total);
    float* out = w.out + (first + r) * kScores;
    for (int64_t d = 0; d < value_dim; d += kLanes) store(out + d, load(out + d) * shrink[r]);
  }
}

struct ForwardViews {
  const HeadsView &q, &k, &v, &out;
  float* lse;
};

// Queries [begin, end) of one head.
template <class T, class O>
void forward_block(const ForwardViews& t, int64_t b, int64_t h, int64_t begin, int64_t end,
                   const AttentionShape& s, ForwardScratch<O>& w) {
  const int64_t kv = h / s.group(), count = end - begin, last_keys = s.visible_keys(end - 1);
  const int64_t k_panel = panel_size(s.head_dim), v_panel = panel_size(kKeys);
  const float scale = kScalesQueries<O> ? 1.0f : s.scale;
  pack_left(t.q.at<const T>(b, h, begin), t.q.row_stride, s.scale, w.q, count, s.head_dim);
  std::fill_n(w.max, count, -kInfinity);
  std::fill_n(w.sum, count, 0.0f);
  for (int64_t r = 0; r < count; ++r) std::fill_n(w.out + r * kScores, s.value_dim, 0.0f);
  for (int64_t key = 0; key < last_keys; key += kKeys) {
    const int64_t keys = std::min(kKeys, last_keys - key);
    pack_right_transposed(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k, k_panel, s.head_dim, keys);
    pack_right(t.v.at<const T>(b, kv, key), t.v.row_stride, w.v, v_panel, keys, s.value_dim);
    for (int64_t i = 0; i < count; i += kForwardQueries) {
      const int64_t rows = std::min(kForwardQueries, count - i);
      const int64_t columns = std::min(keys, s.visible_keys(begin + i + rows - 1) - key);
      if (columns <= 0) continue;
      float* out = w.out + i * kScores;
      multiply(w.q + i * kStride<O>, w.k, k_panel, w.scores, kScores, rows, columns, s.head_dim, false);
      softmax_tile(w, i, rows, round_up(columns, kTileDepth<O>), s.value_dim, scale,
                   [&](int64_t r) { return std::min(columns, s.visible_keys(begin + i + r) - key); });
      multiply(w.p, w.v, v_panel, out, kScores, rows, s.value_dim, columns, true);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const bool sees = s.visible_keys(begin + r) > 0;
    t.lse[(b * s.heads + h) * s.queries + begin + r] = sees ? w.max[r] + std::log(w.sum[r]) : -kInfinity;
    const float factor = sees ? 1.0f / w.sum[r] : 0.0f;
    T* to = t.out.at<T>(b, h, begin + r);
    for_each_vector(s.value_dim, [&](int64_t d, auto lanes) {
      lanes.store(to + d, load(w.out + r * kScores + d) * factor);
    });
  }
}

template <class T>
void forward(const ForwardViews& t, const AttentionShape& s, int threads) {
  using Scratch = ForwardScratch<OperandOf<T>>;
  const int64_t blocks = (s.queries + kBlock - 1) / kBlock, items = s.batch * s.heads * blocks;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[std::max(threads, 1)]);
  parallel_claim(items, s.batch * s.heads * s.queries * s.keys, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    for (int64_t item; (item = next()) < items;) {
      const int64_t block = blocks - 1 - item % blocks;  // the longest first, where attention is causal
      const int64_t head = item / blocks, begin = block * kBlock;
      forward_block<T>(t, head / s.heads, head % s.heads, begin, std::min(s.queries, begin + kBlock), s,
                       scratch[thread]);
    }
  });
}

template <class O>
struct BackwardScratch {
  alignas(64) O q[kBackwardQueries * kStride<O>], dout[kBackwardQueries * kStride<O>];
  O k_transposed[kKeys * kMaxDim], v_transposed[kKeys * kMaxDim];  // right sides
  O k[kKeys * kMaxDim], p[kBackwardQueries * kKeys],
      ds[kBackwardQueries * kKeys];  // also
  O ds_left[kBackwardQueries * kStride<O>], transposed[kMaxDim * kStride<O>];
  float scores[kBackwardQueries * kScores], dscores[kBackwardQueries * kScores];
  float dk[kMaxDim * kScores], dv[kMaxDim * kScores];  // transposed: (dim, keys)
};

// Turns a tile of scores and of dp = dout v^T into p and ds = p * (dp - delta).
template <class O>
void probabilities(BackwardScratch<O>& w, const float* lse, const float* delta, int64_t first_query,
                   int64_t first_key, int64_t rows, int64_t columns, const AttentionShape& s) {
  constexpr int64_t kUnit = std::max<int64_t>(kTileDepth<O>, kLanes),
                    kPanelSize = panel_size(kBackwardQueries);
  const float scale = kScalesQueries<O> ? 1.0f : s.scale;
  for (int64_t first = 0; first < round_up(rows, std::max<int64_t>(2, kTileDepth<O>)); first += 2) {
    float *score = w.scores + first * kScores, *dscore = w.dscores + first * kScores, factor[2], dot[2];
    int64_t visible[2];
    for (int64_t r = 0; r < 2; ++r) {
      const int64_t row = first + r, sees = row < rows ? s.visible_keys(first_query + row) : 0;
      visible[r] = std::min(columns, sees - first_key);
      // Where all keys of a query lie in this tile, its maximum and its sums can be had from what is here,
      // with the rounding errors of p and dp in them, which then cancel: a query that looks at one key alone
      // has exactly ds = 0, and exp() is of small numbers, which are known better than their distance from
      // lse.
      const bool whole = first_key == 0 && sees <= columns && sees > 0;
      float zero = row < rows ? lse[row] : 0.0f;
      if (whole) {
        F largest = broadcast(-kInfinity);
        for (int64_t n = 0; n < visible[r]; n += kLanes)
          largest =
              lspm::max(first_lanes(load(score + r * kScores + n) * scale, visible[r] - n, largest), largest);
        zero = lspm::max(largest);
      }
      F sums{}, dots{};
      for (int64_t n = 0; n < visible[r]; n += kLanes) {
        const F p = exp(load(score + r * kScores + n) * scale - zero);
        sums += first_lanes(p, visible[r] - n, F{});
        dots += first_lanes(p * load(dscore + r * kScores + n), visible[r] - n, F{});
        store(score + r * kScores + n, p);
      }
      factor[r] = whole ? 1.0f / sum(sums) : 1.0f;
      dot[r] = whole ? sum(dots) / sum(sums) : row < rows ? delta[row] : 0.0f;
    }
    for (int64_t n = 0; n < round_up(columns, kUnit); n += kLanes) {
      F p[2], ds[2];
      for (int64_t r = 0; r < 2; ++r) {
        p[r] = first_lanes(load(score + r * kScores + n) * factor[r], visible[r] - n, F{});
        ds[r] = first_lanes(p[r] * (load(dscore + r * kScores + n) - dot[r]), visible[r] - n, F{});
        store_left(w.ds_left + (first + r) * kStride<O> + n, ds[r]);
      }
      store_right(right_at(w.p, kPanelSize, first, n), p[0], p[1]);
      store_right(right_at(w.ds, kPanelSize, first, n), ds[0], ds[1]);
    }
  }
}

// Where the key tiles of the heads stand: key tile j adds to a query tile of dq when its turn is j.
struct Turns {
  std::vector<std::atomic<int64_t>> turns;
  explicit Turns(int64_t n) : turns(n) {}
  void wait(int64_t i, int64_t turn) const {
    while (turns[i].load(std::memory_order_acquire) != turn) std::this_thread::yield();
  }
  void pass(int64_t i, int64_t turn) { turns[i].store(turn + 1, std::memory_order_release); }
};

// Rows [0, rows) of `to` from the columns of `from`.
template <class T>
void write_transposed(T* to, int64_t stride, const float* from, int64_t rows, int64_t dims, float scale) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for_each_vector(dims, [&](int64_t d, auto lanes) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (d + i) * kScores + r) * scale;
      transpose(block);
      for (int i = 0; i < std::min<int64_t>(kLanes, rows - r); ++i)
        lanes.store(to + (r + i) * stride + d, block[i]);
    });
}

struct BackwardViews {
  const HeadsView &dout, &q, &k, &v, &out, &dq, &dk, &dv;
  const float* lse;
  float* delta;
};

// Keys [key, key + kKeys) of one key head. dq_sums: (group, queries rounded up to a tile, dq_row).
template <class T, class O>
void backward_tile(const BackwardViews& t, float* dq_sums, int64_t dq_row, Turns& turns, int64_t first_turn,
                   int64_t b, int64_t kv, int64_t key, const AttentionShape& s, BackwardScratch<O>& w) {
  const int64_t keys = std::min(kKeys, s.keys - key), D = s.head_dim, Dv = s.value_dim;
  const int64_t tiles = (s.queries + kBackwardQueries - 1) / kBackwardQueries;
  const int64_t d_panel = panel_size(D), dv_panel = panel_size(Dv), k_panel = panel_size(kKeys);
  constexpr int64_t kQueryPanel = panel_size(kBackwardQueries);
  pack_right_transposed(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k_transposed, d_panel, D, keys);
  pack_right_transposed(t.v.at<const T>(b, kv, key), t.v.row_stride, w.v_transposed, dv_panel, Dv, keys);
  pack_right(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k, k_panel, keys, D);
  std::fill_n(w.dk, D * kScores, 0.0f);
  std::fill_n(w.dv, Dv * kScores, 0.0f);
  for (int64_t item = 0; item < s.group() * tiles; ++item) {
    const int64_t h = kv * s.group() + item / tiles, i = item % tiles * kBackwardQueries;
    const int64_t rows = std::min(kBackwardQueries, s.queries - i), sees = s.visible_keys(i + rows - 1);
    const int64_t columns = std::min(keys, sees - key), row = (b * s.heads + h) * s.queries + i;
    if (columns <= 0) {
      if (key == 0)
        for (int64_t r = 0; r < rows; ++r) std::fill_n(t.dq.at<T>(b, h, i + r), D, T{});
      continue;
    }
    pack_left(t.q.at<const T>(b, h, i), t.q.row_stride, s.scale, w.q, rows, D);
    pack_left(t.dout.at<const T>(b, h, i), t.dout.row_stride, 1.0f, w.dout, rows, Dv);
    multiply(w.q, w.k_transposed, d_panel, w.scores, kScores, rows, columns, D, false);
    multiply(w.dout, w.v_transposed, dv_panel, w.dscores, kScores, rows, columns, Dv, false);
    probabilities(w, t.lse + row, t.delta + row, i, key, rows, columns, s);
    multiply_transposed(w.dout, w.transposed, w.p, kQueryPanel, w.dv, kScores, Dv, columns, rows, true);
    multiply_transposed(w.q, w.transposed, w.ds, kQueryPanel, w.dk, kScores, D, columns, rows, true);

    float* sums = dq_sums + item * kBackwardQueries * dq_row;
    turns.wait(first_turn + item, key / kKeys);
    multiply(w.ds_left, w.k, k_panel, sums, dq_row, rows, D, columns, key > 0);
    for (int64_t r = 0; r < rows && sees <= key + keys; ++r)  // no tile adds to them after this one
      for_each_vector(D, [&](int64_t d, auto lanes) {
        lanes.store(t.dq.at<T>(b, h, i + r) + d, load(sums + r * dq_row + d) * s.scale);
      });
    turns.pass(first_turn + item, key / kKeys);
  }
  const float scale = kScalesQueries<O> ? 1.0f : s.scale;
  write_transposed(t.dk.at<T>(b, kv, key), t.dk.row_stride, w.dk, keys, D, scale);
  write_transposed(t.dv.at<T>(b, kv, key), t.dv.row_stride, w.dv, keys, Dv, 1.0f);
}

template <class T>
void row_dots(const BackwardViews& t, const AttentionShape& s, int threads) {
  const int64_t rows = s.batch * s.heads * s.queries;
  parallel_for(rows, rows * s.value_dim, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / s.queries / s.heads, h = row / s.queries % s.heads, i = row % s.queries;
      const T *x = t.dout.at<const T>(b, h, i), *y = t.out.at<const T>(b, h, i);
      t.delta[row] =
          sum_of(s.value_dim, [&](int64_t d, auto lanes) { return lanes.load(x + d) * lanes.load(y + d); });
    }
  });
}

template <class T>
void backward(const BackwardViews& t, const AttentionShape& s, int threads) {
  using Scratch = BackwardScratch<OperandOf<T>>;
  row_dots<T>(t, s, threads);
  // At least one tile, which zeroes dq where there are no keys.
  const int64_t key_tiles = std::max<int64_t>(1, (s.keys + kKeys - 1) / kKeys);
  const int64_t query_tiles = s.group() * ((s.queries + kBackwardQueries - 1) / kBackwardQueries);
  const int64_t heads = s.batch * s.kv_heads;
  const int64_t dq_row = round_up(s.head_dim, std::is_same_v<OperandOf<T>, float> ? kLanes : kPanel);
  // A thread takes all key tiles of a head where there are heads enough to go round, else one tile at a time.
  // The tiles are handed out in order, so that whatever a tile waits for has begun.
  const bool whole = heads >= 4 * threads;
  const int64_t claims = whole ? heads : heads * key_tiles, slots = whole ? std::max(threads, 1) : heads;
  const int64_t dq_size = query_tiles * kBackwardQueries * dq_row;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[std::max(threads, 1)]);
  const std::unique_ptr<float[]> dq_sums(new float[slots * dq_size]);
  Turns turns(slots * query_tiles);
  parallel_claim(claims, s.batch * s.heads * s.queries * s.keys, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    for (int64_t claim; (claim = next()) < claims;) {
      const int64_t head = whole ? claim : claim / key_tiles, slot = whole ? thread : head;
      const int64_t first = whole ? 0 : claim % key_tiles, last = whole ? key_tiles : first + 1;
      if (whole)
        for (int64_t i = 0; i < query_tiles; ++i) turns.turns[slot * query_tiles + i] = 0;
      for (int64_t tile = first; tile < last; ++tile)
        backward_tile<T>(t, dq_sums.get() + slot * dq_size, dq_row, turns, slot * query_tiles,
                         head / s.kv_heads, head % s.kv_heads, tile * kKeys, s, scratch[thread]);
    }
  });
}

}  // namespace

void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                       float* lse, const AttentionShape& s, int threads) {
  const ForwardViews t{q, k, v, out, lse};
  switch (s.dtype) {
    case DType::f32:
      return forward<float>(t, s, threads);
    case DType::bf16:
      return forward<bf16>(t, s, threads);
    default:
      return forward<f16>(t, s, threads);
  }
}

void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                        const HeadsView& out, const float* lse, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, float* delta, const AttentionShape& s, int threads) {
  const BackwardViews t{dout, q, k, v, out, dq, dk, dv, lse, delta};
  switch (s.dtype) {
    case DType::f32:
      return backward<float>(t, s, threads);
    case DType::bf16:
      return backward<bf16>(t, s, threads);
    default:
      return backward<f16>(t, s, threads);
  }
}

}  // namespace lspm::cpu
