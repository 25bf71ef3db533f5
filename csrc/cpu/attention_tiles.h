// What the forward and the backward of attention have in common: their tiles.
#pragma once
#include <memory>

#include "cpu/gemm.h"
#include "cpu/gemm_bf16.h"
#include "cpu/parallel.h"
#include "cpu/scores.h"

namespace lspm::cpu {

constexpr int64_t kKeys = 256;  // keys in a tile: many, which spares passes over queries and sums
constexpr int64_t kMaxDim = kMaxDepth;
constexpr int64_t kScores = kStride<float>;  // elements from row to row of all that is float in scratch
constexpr int64_t kSkip = 64;  // what a window hides at the beginning of a tile is left out in such steps

// Whether q is multiplied by the scale as it is packed; bf16 would round it again, so there the scores are.
template <class O>
constexpr bool kScalesQueries = std::is_same_v<O, float>;

// The first column of a tile of keys from `key` on that a product for the queries from `query` on needs.
inline int64_t first_column(const AttentionShape& s, int64_t query, int64_t key) {
  return std::max<int64_t>(0, s.first_key(query) - key) / kSkip * kSkip;
}

// Calls f(T{}) with the type of q, k and v.
template <class Call>
void with_type(const AttentionShape& s, Call f) {
  if (s.dtype == DType::f32) return f(float{});
  return s.dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

struct ForwardViews {
  const HeadsView &q, &k, &v;
  const AttentionExtras& extras;
  const HeadsView& out;
  float *lse, *statistics;
};

// Calls f(data, first, rows) for rows [begin, begin + count) of a head in stretches that lie a stride apart.
template <class T, class Call>
void for_each_stretch(const HeadsView& t, int64_t b, int64_t h, int64_t begin, int64_t count, Call f) {
  for (int64_t i = 0, rows; i < count; i += rows) {
    rows = t.together(begin + i, count - i);
    f(t.at<const T>(b, h, begin + i), i, rows);
  }
}

// Rows of a tile: where they are, or in a copy where they lie on several pages.
class RowBuffer {
 public:
  template <class T>
  struct Rows {
    const T* data;
    int64_t stride;
  };

  template <class T>
  Rows<T> rows(const HeadsView& t, int64_t b, int64_t h, int64_t begin, int64_t count, int64_t dim) {
    if (t.together(begin, count) == count) return {t.at<const T>(b, h, begin), t.row_stride};
    if (!copy_) copy_.reset(new float[kKeys * kMaxDim]);
    T* const copy = reinterpret_cast<T*>(copy_.get());
    for_each_stretch<T>(t, b, h, begin, count, [&](const T* from, int64_t first, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(from + r * t.row_stride, dim, copy + (first + r) * kMaxDim);
    });
    return {copy, kMaxDim};
  }

 private:
  std::unique_ptr<float[]> copy_;
};

// The end of a query's softmax: writes its output, from what was summed under its maximum and the sum of all
// that, and lse and the statistics.
template <class T>
void finish_row(const ForwardViews& t, const AttentionShape& s, int64_t b, int64_t h, int64_t query,
                float max, double sum, const float* summed) {
  // Without a mask or a bias, scores that are all -inf have overflowed: their softmax stays NaN.
  const bool hides = t.extras.mask.data || t.extras.bias.data;
  const bool sees = s.first_key(query) < s.end_key(query) && !(hides && sum == 0);
  const float sink = t.extras.sinks ? t.extras.sinks[h] : -kInfinity, common = std::max(max, sink);
  const double below = double(max) - common;  // mostly 0, whose exponential need not be computed
  const double part = !sees ? 0.0 : below == 0 ? 1.0 : std::exp(below);  // of all summed
  const double total = sum * part + (t.extras.sinks ? std::exp(double(sink) - common) : 0.0);
  const int64_t row = s.row(b, h, query), rows = s.rows();
  t.lse[row] = total == 0 ? -kInfinity : float(common + std::log(total));
  if (t.statistics) {
    t.statistics[row] = total == 0 ? 0.0f : common;
    t.statistics[rows + row] = total == 0 ? 0.0f : float(1.0 / total);
  }
  const float factor = sees ? float(part / total) : 0.0f;
  T* to = t.out.at<T>(b, h, query);
  for_each_vector(s.value_dim,
                  [&](int64_t d, auto lanes) { lanes.store(to + d, load(summed + d) * factor); });
}

// The forward for so few queries that reading keys and values takes longer than all products: see
// attention_decode.cpp. No backward follows: its scores would be rounded otherwise than these, and where one
// key has nearly all of a softmax that shows.
constexpr int64_t kFewQueries = 4;
void attention_decode(const ForwardViews& t, const AttentionShape& s, int threads);

}  // namespace lspm::cpu
