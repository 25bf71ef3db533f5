// The forward of attention for few queries, as when a text is generated token by token against a long cache.
//
// Such a call is bound by reading keys and values, so nothing is packed: a thread owns a chunk of kKeys keys
// of one key head and reads each row of k and of v once for all queries of all heads that share it. Chunks
// are as long whatever the number of threads, and what they find is joined in their order (split-KV, as in
// Flash-Decoding, Dao et al. 2023), so that the bits depend on no schedule.
#include <cmath>
#include <memory>

#include "attention.h"
#include "cpu/attention_tiles.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kAhead = 4;  // rows of keys or values that are fetched before they are needed

// scores[r][j] = q[r] . k[j] for kRows rows of q, which are q_stride apart and end in zeros.
template <int kRows, class T>
void score_rows(const T* k, int64_t stride, int64_t keys, const float* q, int64_t q_stride, int64_t dim,
                float* scores) {
  for (int64_t j = 0; j < keys; ++j, k += stride) {
    F sums[kRows] = {};
    for_each_vector(dim, [&](int64_t d, auto lanes) {
      const F x = lanes.load(k + d);
      prefetch(k + kAhead * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r] += x * load(q + r * q_stride + d);
    });
    for (int r = 0; r < kRows; ++r) scores[r * kKeys + j] = sum(sums[r]);
  }
}

// Adds p[r][j] v[j] over j to out[r], for kRows rows.
template <int kRows, class T>
void value_rows(const T* v, int64_t stride, int64_t keys, const float* p, int64_t dim, float* out,
                int64_t out_stride) {
  constexpr int kVectors = 4;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
    F sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVectors; ++c) sums[r][c] = load(out + r * out_stride + d + c * kLanes);
    const T* row = v + d;
    for (int64_t j = 0; j < keys; ++j, row += stride)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const F x = load(row + c * kLanes);
        prefetch(row + kAhead * stride + c * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][c] += x * p[r * kKeys + j];
      }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVectors; ++c) store(out + r * out_stride + d + c * kLanes, sums[r][c]);
  }
  for_each_vector(dim - d, [&](int64_t rest, auto lanes) {
    F sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = load(out + r * out_stride + d + rest);
    for (int64_t j = 0; j < keys; ++j) {
      const F x = lanes.load(v + j * stride + d + rest);
      for (int r = 0; r < kRows; ++r) sums[r] += x * p[r * kKeys + j];
    }
    for (int r = 0; r < kRows; ++r) store(out + r * out_stride + d + rest, sums[r]);
  });
}

// Calls call(first row, number of rows as a constant) for blocks of up to four of `rows`.
template <class Call>
void for_row_blocks(int64_t rows, Call call) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) call(r, std::integral_constant<int, 4>{});
  if (r + 2 <= rows) call(r, std::integral_constant<int, 2>{}), r += 2;
  if (r < rows) call(r, std::integral_constant<int, 1>{});
}

// What the chunks of a key head have found for each of its rows: a maximum, a sum and `stride` - 2 sums of
// values.
struct Found {
  std::unique_ptr<float[]> data;
  int64_t rows, stride;
  float* at(int64_t chunk, int64_t row) const { return data.get() + (chunk * rows + row) * stride; }
};

struct DecodeScratch {
  std::unique_ptr<float[]> q, scores, keep;
  int64_t q_stride;

  DecodeScratch(int64_t rows, int64_t queries, int64_t dim) : q_stride(round_up(dim, kLanes)) {
    q.reset(new float[rows * q_stride]());
    scores.reset(new float[rows * kKeys]);
    keep.reset(new float[queries * kKeys]);
  }
};

// Turns a row of scores into p under its own maximum, which it writes beside the sum.
void softmax_row(float* score, const float* keep, int64_t sees, int64_t columns, float scale, float* found) {
  F largest = broadcast(-kInfinity), total{};
  for (int64_t n = 0; n < sees; n += kLanes)
    largest = lspm::max(first_lanes(load(score + n) * scale, sees - n, largest), largest);
  const float max = lspm::max(largest), base = max == -kInfinity ? 0.0f : max;
  for (int64_t n = 0; n < columns; n += kLanes) {
    const F e = first_lanes(exp(load(score + n) * scale - base), sees - n, F{});
    total += e;
    store(score + n, keep ? e * load(keep + n) : e);
  }
  found[0] = max;
  found[1] = sum(total);
}

// The chunk of keys from `key` on. Rows are those of the head's queries, head by head.
template <class T>
void decode_chunk(const ForwardViews& t, const AttentionShape& s, int64_t b, int64_t kv, int64_t key,
                  const Found& found, int64_t place, DecodeScratch& w) {
  const int64_t rows = s.group() * s.queries, columns = std::min(kKeys, s.end_key(s.queries - 1) - key);
  if (columns <= 0 || s.first_key(0) >= key + columns) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(found.at(place, r), found.stride, 0.0f);
      found.at(place, r)[0] = -kInfinity;
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* q = t.q.at<const T>(b, kv * s.group() + r / s.queries, r % s.queries);
    for_each_vector(s.head_dim,
                    [&](int64_t d, auto lanes) { store(w.q.get() + r * w.q_stride + d, lanes.load(q + d)); });
  }
  for_each_stretch<T>(t.k, b, kv, key, columns, [&](const T* k, int64_t first, int64_t keys) {
    for_row_blocks(rows, [&](int64_t r, auto n) {
      score_rows<n.value>(k, t.k.row_stride, keys, w.q.get() + r * w.q_stride, w.q_stride, s.head_dim,
                          w.scores.get() + r * kKeys + first);
    });
  });
  for (int64_t head = 0; head < s.group(); ++head) {
    const ScoresTile tile{b, kv * s.group() + head, 0, key, s.queries, columns};
    float* const scores = w.scores.get() + head * s.queries * kKeys;
    const bool extras = has_extras(tile, s, t.extras);
    if (extras) add_extras(scores, nullptr, kKeys, tile, s.scale, s, t.extras);
    if (s.dropout > 0) draw_dropout(w.keep.get(), kKeys, tile, s);
    for (int64_t i = 0; i < s.queries; ++i)
      softmax_row(scores + i * kKeys, s.dropout > 0 ? w.keep.get() + i * kKeys : nullptr,
                  std::min(columns, s.end_key(i) - key), columns, extras ? 1.0f : s.scale,
                  found.at(place, head * s.queries + i));
  }
  for (int64_t r = 0; r < rows; ++r) std::fill_n(found.at(place, r) + 2, found.stride - 2, 0.0f);
  for_each_stretch<T>(t.v, b, kv, key, columns, [&](const T* v, int64_t first, int64_t keys) {
    for_row_blocks(rows, [&](int64_t r, auto n) {
      value_rows<n.value>(v, t.v.row_stride, keys, w.scores.get() + r * kKeys + first, s.value_dim,
                          found.at(place, r) + 2, found.stride);
    });
  });
}

template <class T>
void decode(const ForwardViews& t, const AttentionShape& all, int threads) {
  const int64_t rows = all.group() * all.queries, heads = all.batch * all.kv_heads;
  const int64_t chunks = std::max<int64_t>(1, (all.keys + kKeys - 1) / kKeys);
  Found found{nullptr, rows, 2 + round_up(all.value_dim, kLanes)};
  found.data.reset(new float[heads * chunks * rows * found.stride]);
  const int64_t work = heads * all.keys * (all.head_dim + all.value_dim);
  parallel_claim(heads * chunks, work, threads, [&](auto next, int) {
    DecodeScratch w(rows, all.queries, all.head_dim);
    for (int64_t item; (item = next()) < heads * chunks;) {
      const int64_t b = item / chunks / all.kv_heads, kv = item / chunks % all.kv_heads;
      decode_chunk<T>(t, all.of(b), b, kv, item % chunks * kKeys, found, item, w);
    }
  });
  parallel_for(heads, work, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> out(new float[found.stride]);
    for (int64_t row = begin * rows; row < end * rows; ++row) {
      const int64_t head = row / rows, r = row % rows;
      const AttentionShape s = all.of(head / all.kv_heads);
      if (r >= s.group() * s.queries) continue;
      float max = -kInfinity, sum = 0;
      for (int64_t c = 0; c < chunks; ++c) max = std::max(max, found.at(head * chunks + c, r)[0]);
      std::fill_n(out.get(), found.stride, 0.0f);
      for (int64_t c = 0; c < chunks; ++c) {
        const float* part = found.at(head * chunks + c, r);
        const float shrink = part[0] == -kInfinity && max == -kInfinity ? 1.0f : std::exp(part[0] - max);
        sum += part[1] * shrink;
        for (int64_t d = 0; d < s.value_dim; d += kLanes)
          store(out.get() + d, load(out.get() + d) + load(part + 2 + d) * shrink);
      }
      finish_row<T>(t, s, head / s.kv_heads, head % s.kv_heads * s.group() + r / s.queries, r % s.queries,
                    max, sum, out.get());
    }
  });
}

}  // namespace

void attention_decode(const ForwardViews& t, const AttentionShape& s, int threads) {
  with_type(s, [&](auto type) { decode<decltype(type)>(t, s, threads); });
}

}  // namespace lspm::cpu
