// What stands between q k^T and the softmax: the cap, the slope, bias, mask and window; and dropout behind
// it.
#pragma once
#include <cmath>
#include <limits>

#include "attention.h"
#include "cpu/philox.h"
#include "cpu/tanh.h"

namespace lspm::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Queries [query, query + rows) and keys [key, key + columns) of one head.
struct ScoresTile {
  int64_t batch, head, query, key, rows, columns;
};

// n lanes of a row of T from `at` on; those beyond are 0.
template <class T>
F load_row(const T* at, int64_t stride, int64_t n) {
  if (stride == 1) return n >= kLanes ? load(at) : FirstLanes{int(n)}.load(at);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < std::min<int64_t>(n, kLanes); ++i) lanes[i] = at[i * stride];
  return load(lanes);
}

inline F load_mask(const uint8_t* at, int64_t stride, int64_t n, F score) {
  uint8_t lanes[kLanes] = {};
  const bool dense = stride == 1 && n >= kLanes;
  for (int64_t i = 0; i < std::min<int64_t>(n, kLanes) && !dense; ++i) lanes[i] = at[i * stride];
  return select(dense ? at : lanes, score, broadcast(-kInfinity));
}

// Adds n lanes of a bias or mask, from column n on of a row, to scores.
inline F add_scores(const ScoresView& view, int64_t at, int64_t n, F score) {
  switch (view.dtype) {
    case DType::f32:
      return score + load_row(static_cast<const float*>(view.data) + at, view.key_stride, n);
    case DType::bf16:
      return score + load_row(static_cast<const bf16*>(view.data) + at, view.key_stride, n);
    case DType::f16:
      return score + load_row(static_cast<const f16*>(view.data) + at, view.key_stride, n);
    default:
      return load_mask(static_cast<const uint8_t*>(view.data) + at, view.key_stride, n, score);
  }
}

inline int64_t row_of(const ScoresView& view, const ScoresTile& t, int64_t r) {
  return t.batch * view.batch_stride + t.head * view.head_stride + (t.query + r) * view.row_stride +
         t.key * view.key_stride;
}

// Whether scores are more than products times the scale, with columns hidden at the end alone.
inline bool has_extras(const ScoresTile& t, const AttentionShape& s, const AttentionExtras& x) {
  return x.bias.data || x.mask.data || x.slopes.data || s.softcap != 0 ||
         s.first_key(t.query + t.rows - 1) > t.key;
}

// Turns products, times `scale`, into scores: -inf where the window's left side or a mask hides them.
// cap_slope, or null: what of a score's gradient the cap leaves.
inline void add_extras(float* scores, float* cap_slope, int64_t stride, const ScoresTile& t, float scale,
                       const AttentionShape& s, const AttentionExtras& x) {
  F lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = float(i);
  const float slope =
      x.slopes.data ? static_cast<const float*>(
                          x.slopes.data)[t.batch * x.slopes.batch_stride + t.head * x.slopes.head_stride]
                    : 0.0f;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t hidden = s.first_key(t.query + r) - t.key, distance = t.query + r + s.shift - t.key;
    for (int64_t n = 0; n < t.columns; n += kLanes) {
      F v = load(scores + r * stride + n) * scale;
      if (s.softcap != 0) {
        const F part = tanh(v / s.softcap);
        if (cap_slope) store(cap_slope + r * stride + n, 1.0f - part * part);
        v = part * s.softcap;
      }
      if (x.slopes.data) {
        const F apart = float(distance - n) - lane;
        v -= slope * (apart < 0.0f ? -apart : apart);
      }
      if (x.bias.data) v = add_scores(x.bias, row_of(x.bias, t, r) + n * x.bias.key_stride, t.columns - n, v);
      if (x.mask.data) v = add_scores(x.mask, row_of(x.mask, t, r) + n * x.mask.key_stride, t.columns - n, v);
      store(scores + r * stride + n, hidden > n ? first_lanes(broadcast(-kInfinity), hidden - n, v) : v);
    }
  }
}

// keep: 0 for what dropout drops of the tile, 1 / (1 - dropout) for the rest. t.key is a multiple of 64.
inline void draw_dropout(float* keep, int64_t stride, const ScoresTile& t, const AttentionShape& s) {
  constexpr int64_t kColumns = 64, kWord = 16;  // columns that share counters, and of them a word's
  const auto threshold = uint32_t(std::min(s.dropout * 4294967296.0, 4294967295.0));
  const F kept = broadcast(float(1.0 / (1.0 - s.dropout)));
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t n = 0; n < t.columns; n += kColumns)
      for (int64_t part = 0; part < kWord; part += kLanes) {
        U x[4] = {};
        for (int i = 0; i < kLanes; ++i) x[0][i] = uint32_t((t.key + n) / kColumns * kWord + part + i);
        x[1] += uint32_t(t.query + r);
        x[2] += uint32_t(t.head);
        x[3] += uint32_t(t.batch);
        philox(s.seed, x);
        for (int word = 0; word < 4; ++word)
          store(keep + r * stride + n + word * kWord + part, x[word] >= threshold ? kept : F{});
      }
}

}  // namespace lspm::cpu
