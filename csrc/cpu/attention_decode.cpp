// The forward of attention for few queries, as when a text is generated token by token against a long cache.
//
// Such a call is bound by reading keys and values, so nothing is packed: a thread owns a chunk of kKeys keys
// and reads each row of k and of v once for all queries of all heads that share it. Where the rows of several
// heads lie side by side, a chunk is that of all of them, so that memory is read from front to back. Chunks
// are as long whatever the number of threads, and what they find is joined in their order (split-KV, as in
// Flash-Decoding, Dao et al. 2023), so that the bits depend on no schedule.
#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>

#include "attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/pairs.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kRead = 16;   // rows whose heads are read one after the other
constexpr int64_t kAhead = 64;  // the most rows that are fetched before they are needed

// The rows of a chunk in its first head, wherever their pages lie, and behind them what is to be fetched at
// the end of the chunk.
template <class T>
struct RowList {
  const T* at[kKeys + kAhead + kLanes];
  int64_t size = 0;

  void add(const HeadsView& t, int64_t b, int64_t h, int64_t begin, int64_t count) {
    for_each_stretch<T>(t, b, h, begin, count, [&](const T* row, int64_t, int64_t rows) {
      for (int64_t i = 0; i < rows; ++i, row += t.row_stride) at[size++] = row;
    });
  }
  void add(int64_t count, const T* row) {
    while (count-- > 0) at[size++] = row;
  }
};

// Rows of one head, by those of the first.
template <class T>
struct Rows {
  const T* const* first_head;
  int64_t head_offset, ahead;
  const T* operator[](int64_t row) const { return first_head[row] + head_offset; }
  void fetch(int64_t row, int64_t d) const { prefetch_far((*this)[row + ahead] + d); }
};

// Whether products are taken of two bf16 at once, as the instruction set has them.
template <class T, class Lanes>
constexpr bool kOfPairs = std::is_same_v<OperandOf<T>, bf16> && std::is_same_v<Lanes, PairLanes<bf16>>;

// A row's elements from p on, ready for add_product().
template <class T, class Lanes>
auto operand(Lanes lanes, const T* p) {
  if constexpr (kOfPairs<T, Lanes>) {
    U u;
    std::memcpy(&u, p, sizeof u);
    return u;
  } else {
    return lanes.load(p);
  }
}

// scores[r][j] = q[r] . k[j] for kRows rows of q, operands that are q_stride apart. As many sums as a vector
// has lanes are added up together; behind the last key, scores up to a multiple of that are written too.
template <int kRows, class T>
void score_rows(Rows<T> k, int64_t keys, const float* q, int64_t q_stride, int64_t dim, float* scores) {
  constexpr int kColumns = kLanes / kRows;
  for (int64_t j = 0; j < keys; j += kColumns) {
    F sums[kLanes] = {};
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c)
      // A call would keep the sums in memory.
      for_each_pair<T>(0, dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
        const auto x = operand(lanes, k[j + c] + d);
        k.fetch(j + c, d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          add_product(sums[r * kColumns + c], stored<std::decay_t<decltype(x)>>(q + r * q_stride + d), x);
      });
    const F all = sums_of(sums);
    for (int r = 0; r < kRows; ++r)
      std::memcpy(scores + r * kKeys + j, reinterpret_cast<const float*>(&all) + r * kColumns,
                  kColumns * sizeof(float));
  }
}

// Probabilities of a row, kKeys to a row, and the same as operands.
template <class T>
struct Probabilities {
  const float* p;
  const OperandOf<T>* operands;
};

// Adds p[r][j] v[j] over j to kParts times `lanes` of out[r] from d on, for kRows rows.
template <int kRows, int kParts, class T, class Lanes>
void add_values(Rows<T> v, int64_t keys, Probabilities<T> of, int64_t d, Lanes lanes, float* out,
                int64_t out_stride) {
  using V = decltype(lanes.load(out));
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  V sums[kRows][kParts];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kParts; ++c) sums[r][c] = lanes.load(out + r * out_stride + d + c * kWidth);
  for (int64_t j = 0; j < keys; j += kOfPairs<T, Lanes> ? 2 : 1)
#pragma GCC unroll 4
    for (int c = 0; c < kParts; ++c) {
      const int64_t at = d + c * kWidth;
      const auto x = operand(lanes, v[j] + at);
      v.fetch(j, at);
      if constexpr (kOfPairs<T, Lanes>) {
        v.fetch(j + 1, at);
        const U next = j + 1 < keys ? operand(lanes, v[j + 1] + at) : U{};
        const U even = (x & 0xffffu) | next << 16, odd = x >> 16 | (next & 0xffff0000u);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const U both = reinterpret_cast<U>(Step<bf16>::load_left(of.operands + r * kKeys + j));
          add_product(sums[r][c].first, both, even);
          add_product(sums[r][c].second, both, odd);
        }
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][c] += x * of.p[r * kKeys + j];
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kParts; ++c) lanes.store(out + r * out_stride + d + c * kWidth, sums[r][c]);
}

// The same for all dims, which out[r] has in T's order (pairs.h).
template <int kRows, class T>
void value_rows(Rows<T> v, int64_t keys, Probabilities<T> of, int64_t dim, float* out, int64_t out_stride) {
  constexpr int kParts = kLanes == 16 || kRows <= 2 ? 2 : 1;  // pairs at once: what has registers
  int64_t d = 0;
  for (; d + kParts * 2 * kLanes <= dim; d += kParts * 2 * kLanes)
    add_values<kRows, kParts>(v, keys, of, d, PairLanes<T>{}, out, out_stride);
  for_each_pair<T>(
      d, dim, [&](int64_t at, auto lanes) { add_values<kRows, 1>(v, keys, of, at, lanes, out, out_stride); });
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
// values, in T's order.
struct Found {
  std::unique_ptr<float[]> data;
  int64_t rows, stride;
  float* at(int64_t chunk, int64_t row) const { return data.get() + (chunk * rows + row) * stride; }
};

template <class T>
struct DecodeScratch {
  std::unique_ptr<float[]> q, scores, keep;
  std::unique_ptr<OperandOf<T>[]> operands;
  int64_t q_stride;
  RowList<T> k, v;

  DecodeScratch(int64_t rows, int64_t queries, int64_t dim) : q_stride(round_up(dim, kLanes)) {
    q.reset(new float[rows * q_stride]);
    scores.reset(new float[rows * kKeys]);
    keep.reset(new float[queries * kKeys]);
    if (!std::is_same_v<OperandOf<T>, float>) operands.reset(new OperandOf<T>[rows * kKeys]);
  }
};

// Turns a row of scores into p under its own maximum, which it writes beside the sum.
template <class O>
void softmax_row(float* score, const float* keep, int64_t sees, int64_t columns, float scale, O* operands,
                 float* found) {
  F largest = broadcast(-kInfinity), total{};
  for (int64_t n = 0; n < sees; n += kLanes)
    largest = lspm::max(first_lanes(load(score + n) * scale, sees - n, largest), largest);
  const float max = lspm::max(largest), base = max == -kInfinity ? 0.0f : max;
  for (int64_t n = 0; n < columns; n += kLanes) {
    const F e = first_lanes(exp(load(score + n) * scale - base), sees - n, F{});
    const F kept = keep ? e * load(keep + n) : e;
    total += e;
    store(score + n, kept);
    if (operands) store(operands + n, kept);
  }
  found[0] = max;
  found[1] = sum(total);
}

// The chunk of keys from `key` on of key heads [kv, end). Rows are those of the heads' queries, head by head.
template <class T>
void decode_chunk(const ForwardViews& t, const AttentionShape& s, int64_t b, int64_t kv, int64_t end,
                  int64_t key, const Found& found, int64_t place, int64_t places, DecodeScratch<T>& w) {
  const int64_t group = s.group() * s.queries, rows = (end - kv) * group;
  const int64_t columns = std::min(kKeys, s.end_key(s.queries - 1) - key);
  const auto found_at = [&](int64_t r) { return found.at(place + r / group * places, r % group); };
  if (columns <= 0 || s.first_key(0) >= key + columns) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(found_at(r), found.stride, 0.0f);
      found_at(r)[0] = -kInfinity;
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* q = t.q.at<const T>(b, kv * s.group() + r / s.queries, r % s.queries);
    for_each_pair<T>(0, s.head_dim, [&](int64_t d, auto lanes) {
      const auto x = operand(lanes, q + d);
      std::memcpy(w.q.get() + r * w.q_stride + d, &x, sizeof x);
    });
  }
  constexpr int64_t kAheadBytes = 4096;
  const int64_t ahead = std::clamp<int64_t>(kAheadBytes / (s.head_dim * sizeof(T)), 2, kAhead);
  w.k.size = w.v.size = 0;
  w.k.add(t.k, b, kv, key, columns);
  w.k.add(-columns & (kLanes - 1), w.k.at[columns - 1]);
  w.v.add(t.v, b, kv, key, columns);
  for (int64_t i = 0; i < kAhead; ++i) w.k.add(1, w.v.at[std::min(i, columns - 1)]);
  w.v.add(kAhead + 1, w.v.at[columns - 1]);  // values are taken two at a time
  const auto for_each_read = [&](auto call) {
    for (int64_t j = 0; j < columns; j += kRead)
      for (int64_t head = 0; head < end - kv; ++head)
        for_row_blocks(group, [&](int64_t r, auto n) {
          call(j, std::min(kRead, columns - j), head, head * group + r, n);
        });
  };
  for_each_read([&](int64_t j, int64_t keys, int64_t head, int64_t r, auto n) {
    score_rows<n.value>(Rows<T>{w.k.at + j, head * t.k.head_stride, ahead}, keys, w.q.get() + r * w.q_stride,
                        w.q_stride, s.head_dim, w.scores.get() + r * kKeys + j);
  });
  for (int64_t r = 0; r < rows; r += s.queries) {
    const ScoresTile tile{b, kv * s.group() + r / s.queries, 0, key, s.queries, columns};
    float* const scores = w.scores.get() + r * kKeys;
    const bool extras = has_extras(tile, s, t.extras);
    if (extras) add_extras(scores, nullptr, kKeys, tile, s.scale, s, t.extras);
    if (s.dropout > 0) draw_dropout(w.keep.get(), kKeys, tile, s);
    for (int64_t i = 0; i < s.queries; ++i)
      softmax_row(scores + i * kKeys, s.dropout > 0 ? w.keep.get() + i * kKeys : nullptr,
                  std::min(columns, s.end_key(i) - key), columns, extras ? 1.0f : s.scale,
                  w.operands ? w.operands.get() + (r + i) * kKeys : nullptr, found_at(r + i));
  }
  for (int64_t r = 0; r < rows; ++r) std::fill_n(found_at(r) + 2, found.stride - 2, 0.0f);
  for_each_read([&](int64_t j, int64_t keys, int64_t head, int64_t r, auto n) {
    const Probabilities<T> of{w.scores.get() + r * kKeys + j,
                              w.operands.get() + (w.operands ? r * kKeys + j : 0)};
    value_rows<n.value>(Rows<T>{w.v.at + j, head * t.v.head_stride, ahead}, keys, of, s.value_dim,
                        found_at(r) + 2, found.stride);
  });
}

// Joins what the chunks of a key head have found.
template <class T>
void join_chunks(const ForwardViews& t, const AttentionShape& s, int64_t b, int64_t kv, int64_t chunks,
                 const Found& found, int64_t place, float* out) {
  for (int64_t r = 0; r < s.group() * s.queries; ++r) {
    float max = -kInfinity, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) max = std::max(max, found.at(place + c, r)[0]);
    std::fill_n(out, found.stride, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      const float* part = found.at(place + c, r);
      const float shrink = part[0] == -kInfinity && max == -kInfinity ? 1.0f : std::exp(part[0] - max);
      sum += part[1] * shrink;
      for (int64_t d = 0; d < s.value_dim; d += kLanes)
        store(out + d, load(out + d) + load(part + 2 + d) * shrink);
    }
    for_each_pair<T>(0, s.value_dim,
                     [&](int64_t d, auto lanes) { lanes.store_ordered(out + d, lanes.load(out + d)); });
    finish_row<T>(t, s, b, kv * s.group() + r / s.queries, r % s.queries, max, sum, out);
  }
}

// How many key heads a chunk has: those that lie side by side, as far as threads have enough chunks.
int64_t heads_of_chunk(const HeadsView& k, const AttentionShape& s, int64_t chunks, int threads) {
  constexpr int64_t kChunksEach = 4;
  const bool apart = !k.pages && k.head_stride >= k.row_stride;
  const int64_t parts = kChunksEach * threads / std::max<int64_t>(1, s.batch * chunks) + 1;
  return apart ? 1 : std::max<int64_t>(1, s.kv_heads / parts);
}

template <class T>
void decode(const ForwardViews& t, const AttentionShape& all, int threads) {
  const int64_t rows = all.group() * all.queries, heads = all.batch * all.kv_heads;
  const int64_t chunks = std::max<int64_t>(1, (all.keys + kKeys - 1) / kKeys);
  const int64_t share = heads_of_chunk(t.k, all, chunks, threads), parts = (all.kv_heads + share - 1) / share;
  Found found{nullptr, rows, 2 + round_up(all.value_dim, kLanes)};
  found.data.reset(new float[heads * chunks * rows * found.stride]);
  const std::unique_ptr<std::atomic<int64_t>[]> ready(new std::atomic<int64_t>[heads]());
  const int64_t items = all.batch * parts * chunks;
  parallel_claim(items, heads * all.keys * (all.head_dim + all.value_dim), threads, [&](auto next, int) {
    DecodeScratch<T> w(share * rows, all.queries, all.head_dim);
    const std::unique_ptr<float[]> out(new float[found.stride]);
    for (int64_t item; (item = next()) < items;) {
      const int64_t chunk = item % chunks, b = item / chunks / parts, kv = item / chunks % parts * share;
      const int64_t end = std::min(all.kv_heads, kv + share), head = b * all.kv_heads + kv;
      const AttentionShape s = all.of(b);
      decode_chunk<T>(t, s, b, kv, end, chunk * kKeys, found, head * chunks + chunk, chunks, w);
      for (int64_t h = 0; h < end - kv; ++h)
        if (ready[head + h].fetch_add(1, std::memory_order_acq_rel) + 1 == chunks)  // the last joins all
          join_chunks<T>(t, s, b, kv + h, chunks, found, (head + h) * chunks, out.get());
    }
  });
}

}  // namespace

void attention_decode(const ForwardViews& t, const AttentionShape& s, int threads) {
  with_type(s, [&](auto type) { decode<decltype(type)>(t, s, threads); });
}

}  // namespace lspm::cpu
