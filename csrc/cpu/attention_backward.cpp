// The backward of attention (Dao, "FlashAttention-2", 2023).
//
// A thread owns a tile of keys of one key head and goes through the queries that see it, so that dk and dv
// stay in scratch; dq is summed in floats, where the key tiles of a head take turns in their order, so that
// its bits depend on no schedule. The gradient of a bias that is one for many heads is summed by whoever owns
// a part of it, in a pass of its own. What the window hides is skipped as in the forward; nothing is ever as
// large as queries x keys.
#include <cmath>
#include <memory>
#include <utility>

#include "attention.h"
#include "cpu/attention_tiles.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kBackwardQueries = 64;  // queries in a tile, and the depth of the sums in dk and dv

template <class O>
struct BackwardScratch {
  alignas(64) O q[kBackwardQueries * kStride<O>], dout[kBackwardQueries * kStride<O>];
  O k_transposed[kKeys * kMaxDim], v_transposed[kKeys * kMaxDim];                   // right sides
  O k[kKeys * kMaxDim], p[kBackwardQueries * kKeys], ds[kBackwardQueries * kKeys];  // also
  O ds_left[kBackwardQueries * kStride<O>], transposed[kMaxDim * kStride<O>];
  float scores[kBackwardQueries * kScores], dscores[kBackwardQueries * kScores];
  float keep[kBackwardQueries * kScores], cap_slope[kBackwardQueries * kScores];
  float dots[kBackwardQueries];                        // the tile's share of the sums of p dp
  float dk[kMaxDim * kScores], dv[kMaxDim * kScores];  // transposed: (dim, keys)
};

struct BackwardViews {
  const HeadsView& dout;
  const float* dlse;
  const HeadsView &q, &k, &v;
  const AttentionExtras& extras;
  const HeadsView &out, &dq, &dk, &dv;
  const ScoresView& dbias;
  const float* statistics;
  float *delta, *dots;  // dots: as delta, of out as it was rounded; scratch
};

// Whether delta comes from out: floats are rounded once there, but D times in each dp. A half type would
// round out too much, so there delta is the sum of p dp.
template <class T>
constexpr bool kDeltaOfOut = std::is_same_v<T, float>;

// Turns a tile of scores over `scale` and of dp = dout v^T, columns from `from` on, into p and ds = p * (dp -
// delta).
template <class O>
void probabilities(BackwardScratch<O>& w, const BackwardViews& t, const ScoresTile& tile, int64_t from,
                   float scale, const AttentionShape& s) {
  constexpr int64_t kUnit = std::max<int64_t>(kTileDepth<O>, kLanes),
                    kPanelSize = panel_size(kBackwardQueries);
  const int64_t rows = tile.rows, columns = tile.columns;
  const int64_t at = s.row(tile.batch, tile.head, tile.query);
  const bool capped = s.softcap != 0, drops = s.dropout > 0;
  for (int64_t first = 0; first < round_up(rows, std::max<int64_t>(2, kTileDepth<O>)); first += 2) {
    float *score = w.scores + first * kScores, *dscore = w.dscores + first * kScores, factor[2], dot[2];
    int64_t visible[2];
    for (int64_t r = 0; r < 2; ++r) {
      const bool inside = first + r < rows;
      const int64_t row = at + first + r, end = inside ? s.end_key(tile.query + first + r) : tile.key;
      visible[r] = std::min(columns, end - tile.key);
      // Where all keys of a query lie in this tile, its maximum and sums can be had from what is here, with
      // the rounding errors of p and dp in them, which then cancel: ds of a key seen alone is exactly 0.
      const int64_t begin = s.first_key(tile.query + first + r);
      const bool whole = begin >= tile.key && visible[r] > begin - tile.key && end - tile.key <= columns;
      const float sink = t.extras.sinks ? t.extras.sinks[tile.head] : -kInfinity;
      float zero = inside ? t.statistics[row] : 0.0f;
      if (whole) {
        F largest = broadcast(-kInfinity);
        for (int64_t n = from; n < visible[r]; n += kLanes)
          largest =
              lspm::max(first_lanes(load(score + r * kScores + n) * scale, visible[r] - n, largest), largest);
        zero = std::max(lspm::max(largest), sink);
        if (zero == -kInfinity) zero = 0;  // all hidden: exp(-inf - 0) is 0
      }
      const float share = inside ? t.statistics[s.rows() + row] : 0.0f;
      WideSum sums, dots;
      for (int64_t n = from; n < visible[r]; n += kLanes) {
        const int64_t place = r * kScores + n;
        const F p = exp(load(score + place) * scale - zero);
        F dp = load(dscore + place);
        if (drops) dp *= load(w.keep + first * kScores + place), store(dscore + place, dp);
        sums.add(n, first_lanes(p, visible[r] - n, F{}));
        dots.add(n, first_lanes(p * dp, visible[r] - n, F{}));
        store(score + place, p);
      }
      const double total = whole ? sums.total() + std::exp(double(sink) - zero) : 0.0;
      const bool renewed = whole && total != 0;
      const double part = renewed ? 1.0 / total : share, product = dots.total() * part;
      factor[r] = float(part);
      w.dots[first + r] = float(product);
      dot[r] = renewed ? float(product - (t.dlse ? t.dlse[row] : 0.0f)) : inside ? t.dots[row] : 0.0f;
    }
    for (int64_t n = from; n < round_up(columns, kUnit); n += kLanes) {
      F p[2], ds[2];
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t place = r * kScores + n;
        p[r] = first_lanes(load(score + place) * factor[r], visible[r] - n, F{});
        ds[r] = first_lanes(p[r] * (load(dscore + place) - dot[r]), visible[r] - n, F{});
        if (t.dbias.data) store(dscore + place, ds[r]);
        if (drops) p[r] = first_lanes(p[r] * load(w.keep + first * kScores + place), visible[r] - n, F{});
        if (capped)
          ds[r] = first_lanes(ds[r] * load(w.cap_slope + first * kScores + place), visible[r] - n, F{});
        store_left(w.ds_left + (first + r) * kStride<O> + n, ds[r]);
      }
      store_right(right_at(w.p, kPanelSize, first, n), p[0], p[1]);
      store_right(right_at(w.ds, kPanelSize, first, n), ds[0], ds[1]);
    }
  }
}

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

// The key tiles [first, last) that queries of [query, query + kBackwardQueries) see.
struct KeyTiles {
  int64_t first, last;
  KeyTiles(const AttentionShape& s, int64_t query)
      : first(s.first_key(query) / kKeys),
        last((s.end_key(std::min(query + kBackwardQueries, s.queries) - 1) + kKeys - 1) / kKeys) {}
};

// Scores, dp = dout v^T and what dropout keeps of one tile. Returns what the scores are still to be
// multiplied by.
template <class T, class O>
float score_products(const BackwardViews& t, const ScoresTile& tile, int64_t from, const AttentionShape& s,
                     BackwardScratch<O>& w) {
  const int64_t b = tile.batch, h = tile.head, i = tile.query, D = s.head_dim, Dv = s.value_dim;
  const int64_t d_panel = panel_size(D), dv_panel = panel_size(Dv), panels = from / kPanel;
  pack_left(t.q.at<const T>(b, h, i), t.q.row_stride, s.scale, w.q, tile.rows, D);
  pack_left(t.dout.at<const T>(b, h, i), t.dout.row_stride, 1.0f, w.dout, tile.rows, Dv);
  multiply(w.q, w.k_transposed + panels * d_panel, d_panel, w.scores + from, kScores, tile.rows,
           tile.columns - from, D, false);
  multiply(w.dout, w.v_transposed + panels * dv_panel, dv_panel, w.dscores + from, kScores, tile.rows,
           tile.columns - from, Dv, false);
  const float scale = kScalesQueries<O> ? 1.0f : s.scale;
  if (s.dropout > 0) draw_dropout(w.keep, kScores, tile, s);
  if (!has_extras(tile, s, t.extras)) return scale;
  add_extras(w.scores, s.softcap != 0 ? w.cap_slope : nullptr, kScores, tile, scale, s, t.extras);
  return 1.0f;
}

// The same, turned into p and ds.
template <class T, class O>
void backward_scores(const BackwardViews& t, const ScoresTile& tile, int64_t from, const AttentionShape& s,
                     BackwardScratch<O>& w) {
  probabilities(w, t, tile, from, score_products<T>(t, tile, from, s, w), s);
}

template <class T, class O>
void pack_keys(const BackwardViews& t, int64_t b, int64_t kv, int64_t key, int64_t keys,
               const AttentionShape& s, BackwardScratch<O>& w) {
  const int64_t D = s.head_dim, Dv = s.value_dim;
  pack_right_transposed(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k_transposed, panel_size(D), D, keys);
  pack_right_transposed(t.v.at<const T>(b, kv, key), t.v.row_stride, w.v_transposed, panel_size(Dv), Dv,
                        keys);
}

// Keys [key, key + kKeys) of one key head. dq_sums: (group, queries rounded up to a tile, dq_row).
template <class T, class O>
void backward_tile(const BackwardViews& t, float* dq_sums, int64_t dq_row, Turns& turns, int64_t first_turn,
                   int64_t b, int64_t kv, int64_t key, const AttentionShape& s, BackwardScratch<O>& w) {
  const int64_t keys = std::min(kKeys, s.keys - key), D = s.head_dim, Dv = s.value_dim;
  const int64_t tiles = (s.queries + kBackwardQueries - 1) / kBackwardQueries;
  const int64_t k_panel = panel_size(kKeys), turn = key / kKeys;
  constexpr int64_t kQueryPanel = panel_size(kBackwardQueries);
  pack_keys<T>(t, b, kv, key, keys, s, w);
  pack_right(t.k.at<const T>(b, kv, key), t.k.row_stride, w.k, k_panel, keys, D);
  std::fill_n(w.dk, D * kScores, 0.0f);
  std::fill_n(w.dv, Dv * kScores, 0.0f);
  for (int64_t item = 0; item < s.group() * tiles; ++item) {
    const int64_t h = kv * s.group() + item / tiles, i = item % tiles * kBackwardQueries;
    const int64_t rows = std::min(kBackwardQueries, s.queries - i);
    const KeyTiles seen(s, i);
    if (seen.first >= seen.last && turn == 0)
      for (int64_t r = 0; r < rows; ++r) {
        std::fill_n(t.dq.at<T>(b, h, i + r), D, T{});
        const int64_t row = s.row(b, h, i + r);
        t.delta[row] = t.dlse ? -t.dlse[row] : 0.0f;
      }
    if (turn < seen.first || turn >= seen.last) continue;
    const ScoresTile tile{b, h, i, key, rows, std::min(keys, s.end_key(i + rows - 1) - key)};
    const int64_t from = first_column(s, i, key), columns = tile.columns - from;
    backward_scores<T>(t, tile, from, s, w);
    multiply_transposed(w.dout, w.transposed, right_at(w.p, kQueryPanel, 0, from), kQueryPanel, w.dv + from,
                        kScores, Dv, columns, rows, true);
    multiply_transposed(w.q, w.transposed, right_at(w.ds, kQueryPanel, 0, from), kQueryPanel, w.dk + from,
                        kScores, D, columns, rows, true);

    float* sums = dq_sums + item * kBackwardQueries * dq_row;
    turns.wait(first_turn + item, turn);
    multiply(w.ds_left + from, w.k + from * kPanel, k_panel, sums, dq_row, rows, D, columns,
             turn > seen.first);
    for (int64_t r = 0; r < rows && turn + 1 == seen.last; ++r)
      for_each_vector(D, [&](int64_t d, auto lanes) {
        lanes.store(t.dq.at<T>(b, h, i + r) + d, load(sums + r * dq_row + d) * s.scale);
      });
    const int64_t row = s.row(b, h, i);
    for (int64_t r = 0; r < rows && !kDeltaOfOut<T>; ++r) {
      if (turn == seen.first) t.delta[row + r] = t.dlse ? -t.dlse[row + r] : 0.0f;
      t.delta[row + r] += w.dots[r];
    }
    turns.pass(first_turn + item, turn);
  }
  const float scale = kScalesQueries<O> ? 1.0f : s.scale;
  write_transposed(t.dk.at<T>(b, kv, key), t.dk.row_stride, w.dk, keys, D, scale);
  write_transposed(t.dv.at<T>(b, kv, key), t.dv.row_stride, w.dv, keys, Dv, 1.0f);
}

// The dot product of each row of dout with that of out, less dlse.
template <class T>
void row_dots(const BackwardViews& t, const AttentionShape& all, int threads) {
  const int64_t tiles = (all.queries + kBackwardQueries - 1) / kBackwardQueries;
  const int64_t items = all.batch * all.heads * tiles;
  parallel_for(items, all.rows() * all.value_dim, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / tiles / all.heads, h = item / tiles % all.heads;
      const AttentionShape s = all.of(b);
      const int64_t first = item % tiles * kBackwardQueries;
      for (int64_t i = first; i < std::min(first + kBackwardQueries, s.queries); ++i) {
        const T *x = t.dout.at<const T>(b, h, i), *y = t.out.at<const T>(b, h, i);
        const int64_t row = s.row(b, h, i);
        WideSum sum;
        for_each_vector(s.value_dim,
                        [&](int64_t d, auto lanes) { sum.add(d, lanes.load(x + d) * lanes.load(y + d)); });
        t.dots[row] = float(sum.total() - (t.dlse ? t.dlse[row] : 0.0f));
        if (kDeltaOfOut<T>) t.delta[row] = t.dots[row];
      }
    }
  });
}

// What one query's softmax has of the keys so far.
struct RowSums {
  float max = -kInfinity;
  double sum = 0, dot = 0;  // dot: of p, as it is under the maximum, and its gradient

  template <class O>
  void add(const BackwardScratch<O>& w, int64_t row, int64_t from, int64_t visible, float scale, bool drops) {
    const float *score = w.scores + row * kScores, *dp = w.dscores + row * kScores;
    F largest = broadcast(max);
    WideSum sums, dots;
    for (int64_t n = from; n < visible; n += kLanes)
      largest = lspm::max(first_lanes(load(score + n) * scale, visible - n, largest), largest);
    const float before = std::exchange(max, lspm::max(largest));
    if (max == -kInfinity) return;
    for (int64_t n = from; n < visible; n += kLanes) {
      const F p = exp(load(score + n) * scale - max), keep = drops ? load(w.keep + row * kScores + n) : F{};
      sums.add(n, first_lanes(p, visible - n, F{}));
      dots.add(n, first_lanes(p * load(dp + n) * (drops ? keep : broadcast(1.0f)), visible - n, F{}));
    }
    const double shrink = std::exp(double(before) - max);
    sum = sum * shrink + sums.total();
    dot = dot * shrink + dots.total();
  }
};

// Finds the statistics and dots of few queries anew, from the scores and dp that their gradients are made of:
// then what was rounded in them cancels, where so few rows do not average it out. That computes these twice.
constexpr int64_t kFewRows = 8;

template <class T>
void renew_statistics(const BackwardViews& t, float* statistics, const AttentionShape& all, int threads) {
  using Scratch = BackwardScratch<OperandOf<T>>;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[std::max(threads, 1)]);
  const int64_t heads = all.batch * all.heads, work = heads * all.queries * all.keys;
  parallel_claim(heads, work, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    Scratch& w = scratch[thread];
    for (int64_t item; (item = next()) < heads;) {
      const int64_t b = item / all.heads, h = item % all.heads;
      const AttentionShape s = all.of(b);
      RowSums found[kFewRows];
      const KeyTiles seen(s, 0);
      for (int64_t j = seen.first; j < seen.last; ++j) {
        const int64_t key = j * kKeys, keys = std::min(kKeys, s.keys - key), from = first_column(s, 0, key);
        const ScoresTile tile{b, h, 0, key, s.queries, std::min(keys, s.end_key(s.queries - 1) - key)};
        pack_keys<T>(t, b, h / s.group(), key, keys, s, w);
        const float scale = score_products<T>(t, tile, from, s, w);
        for (int64_t r = 0; r < s.queries; ++r)
          found[r].add(w, r, from, std::min(tile.columns, s.end_key(r) - key), scale, s.dropout > 0);
      }
      const float sink = t.extras.sinks ? t.extras.sinks[h] : -kInfinity;
      for (int64_t r = 0; r < s.queries; ++r) {
        const int64_t row = s.row(b, h, r);
        const float common = std::max(found[r].max, sink);
        const bool none = common == -kInfinity;
        const double part = none ? 0.0 : std::exp(double(found[r].max) - common);
        const double total = none ? 0.0 : found[r].sum * part + std::exp(double(sink) - common);
        statistics[row] = total == 0 ? 0.0f : common;
        statistics[s.rows() + row] = total == 0 ? 0.0f : float(1.0 / total);
        const double dot = total == 0 ? 0.0 : found[r].dot * part / total;
        t.dots[row] = float(dot - (t.dlse ? t.dlse[row] : 0.0f));
      }
    }
  });
}

// Adds a tile of ds, which lies where dp lay, to the gradient of the bias.
void add_to_bias(const ScoresView& dbias, const float* ds, const ScoresTile& t, int64_t from) {
  const int64_t together = dbias.row_stride ? 1 : t.rows;  // rows that are one row of the bias
  for (int64_t r = 0; r < t.rows; r += together) {
    float* to = static_cast<float*>(const_cast<void*>(dbias.data)) + row_of(dbias, t, r);
    for (int64_t n = from; n < t.columns; ++n) {
      float sums[4] = {};  // short ones, which round less
      for (int64_t i = 0; i < together; ++i) sums[i % 4] += ds[(r + i) * kScores + n];
      to[n * dbias.key_stride] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
}

// The gradient of a bias, whose elements may be those of many heads, rows or columns: whoever owns them goes
// through all of these in order.
template <class T>
void bias_backward(const BackwardViews& t, const AttentionShape& s, int threads) {
  using Scratch = BackwardScratch<OperandOf<T>>;
  const ScoresView& to = t.dbias;
  const int64_t batches = to.distinct(to.batch_stride, s.batch), heads = to.distinct(to.head_stride, s.heads);
  const int64_t key_tiles = (s.keys + kKeys - 1) / kKeys;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[std::max(threads, 1)]);
  const int64_t owners = batches * heads * key_tiles;
  parallel_claim(owners, s.batch * s.heads * s.queries * s.keys, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    Scratch& w = scratch[thread];
    for (int64_t owner; (owner = next()) < owners;)
      for (int64_t b = owner / key_tiles / heads; b < s.batch; b += batches)
        for (int64_t h = owner / key_tiles % heads; h < s.heads; h += heads) {
          const int64_t j = owner % key_tiles, key = j * kKeys, keys = std::min(kKeys, s.keys - key);
          pack_keys<T>(t, b, h / s.group(), key, keys, s, w);
          for (int64_t i = 0; i < s.queries; i += kBackwardQueries) {
            const KeyTiles seen(s, i);
            if (j < seen.first || j >= seen.last) continue;
            const int64_t rows = std::min(kBackwardQueries, s.queries - i), from = first_column(s, i, key);
            const ScoresTile tile{b, h, i, key, rows, std::min(keys, s.end_key(i + rows - 1) - key)};
            backward_scores<T>(t, tile, from, s, w);
            add_to_bias(to, w.dscores, tile, from);
          }
        }
  });
}

template <class T>
void backward(BackwardViews t, const AttentionShape& all, int threads) {
  using Scratch = BackwardScratch<OperandOf<T>>;
  std::unique_ptr<float[]> renewed;
  const bool few = all.queries <= kFewRows && all.keys > kKeys;
  if (!few || kDeltaOfOut<T>) row_dots<T>(t, all, threads);
  if (few) {
    renewed.reset(new float[2 * all.rows()]);
    renew_statistics<T>(t, renewed.get(), all, threads);
    t.statistics = renewed.get();
  }
  // At least one tile, which zeroes dq where there are no keys.
  const int64_t key_tiles = std::max<int64_t>(1, (all.keys + kKeys - 1) / kKeys);
  const int64_t query_tiles = all.group() * ((all.queries + kBackwardQueries - 1) / kBackwardQueries);
  const int64_t heads = all.batch * all.kv_heads;
  const int64_t dq_row = round_up(all.head_dim, std::is_same_v<OperandOf<T>, float> ? kLanes : kPanel);
  // A thread takes all key tiles of a head where there are heads enough to go round, else one tile at a time.
  // The tiles are handed out in order, so that whatever a tile waits for has begun.
  const bool whole = heads >= 4 * threads;
  const int64_t claims = whole ? heads : heads * key_tiles, slots = whole ? std::max(threads, 1) : heads;
  const int64_t dq_size = query_tiles * kBackwardQueries * dq_row;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[std::max(threads, 1)]);
  const std::unique_ptr<float[]> dq_sums(new float[slots * dq_size]);
  Turns turns(slots * query_tiles);
  const auto reset = [&](int64_t slot, const AttentionShape& s) {
    const int64_t tiles = (s.queries + kBackwardQueries - 1) / kBackwardQueries;
    for (int64_t i = 0; i < s.group() * tiles; ++i)
      turns.turns[slot * query_tiles + i] = KeyTiles(s, i % tiles * kBackwardQueries).first;
  };
  for (int64_t slot = 0; slot < slots && !whole; ++slot) reset(slot, all.of(slot / all.kv_heads));
  parallel_claim(claims, all.batch * all.heads * all.queries * all.keys, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    for (int64_t claim; (claim = next()) < claims;) {
      const int64_t head = whole ? claim : claim / key_tiles, slot = whole ? thread : head;
      const int64_t first = whole ? 0 : claim % key_tiles, b = head / all.kv_heads;
      const AttentionShape s = all.of(b);
      const int64_t tiles_of_it = std::max<int64_t>(1, (s.keys + kKeys - 1) / kKeys);
      const int64_t last = std::min(tiles_of_it, whole ? key_tiles : first + 1);
      if (whole) reset(slot, s);
      for (int64_t tile = first; tile < last; ++tile)
        backward_tile<T>(t, dq_sums.get() + slot * dq_size, dq_row, turns, slot * query_tiles, b,
                         head % all.kv_heads, tile * kKeys, s, scratch[thread]);
    }
  });
  if (t.dbias.data) bias_backward<T>(t, all, threads);
}

}  // namespace

void attention_backward(const HeadsView& dout, const float* dlse, const HeadsView& q, const HeadsView& k,
                        const HeadsView& v, const AttentionExtras& extras, const HeadsView& out,
                        const float* statistics, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, const ScoresView& dbias, float* delta, const AttentionShape& s,
                        int threads) {
  const BackwardViews t{dout, dlse, q,  k,     v,          extras, out,
                        dq,   dk,   dv, dbias, statistics, delta,  delta + s.rows()};
  with_type(s, [&](auto type) { backward<decltype(type)>(t, s, threads); });
}

}  // namespace lspm::cpu
