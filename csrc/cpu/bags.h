// What the kernels of embedding_bag share: bags and their checks, sums of rows that lie anywhere, and indices
// sorted by row, so that all that one row of the table takes part in comes one after the other.
//
// The sort is a radix sort, stable and so the same on any number of threads: an entry is a row's number above
// the number of a bag (or, with per_sample_weights, of an index), in as many bits as those need.
#pragma once
#include <omp.h>

#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "embedding_bag.h"

namespace lspm::cpu {

constexpr int64_t kChunk = 2048;  // indices that a thread takes at a time
// Lines that are asked for before they are needed: more than a core has on their way at once, and few enough
// to stay in the first-level cache (32 KiB or more) until they are.
constexpr int64_t kLinesAhead = 64;
constexpr int64_t kLine = 64;

template <class T>
int64_t rows_ahead(int64_t dim) {
  return std::max(int64_t{1}, kLinesAhead * kLine / std::max(kLine, dim * int64_t(sizeof(T))));
}

template <class T>
void prefetch_row(const T* row, int64_t dim) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < std::min(dim * int64_t(sizeof(T)), kLinesAhead * kLine); at += kLine)
    prefetch(bytes + at);
}

// The same bags with types.
template <class T, class I>
struct TypedBags {
  const I *indices, *offsets;
  const T* weights;
  const EmbeddingBagShape& s;

  TypedBags(const Bags& bags, const EmbeddingBagShape& shape)
      : indices(static_cast<const I*>(bags.indices)),
        offsets(static_cast<const I*>(bags.offsets)),
        weights(static_cast<const T*>(bags.per_sample_weights)),
        s(shape) {}

  int64_t begin(int64_t b) const { return offsets ? int64_t(offsets[b]) : s.indices / s.bags * b; }
  int64_t end(int64_t b) const { return b + 1 < s.bags || !offsets ? begin(b + 1) : s.indices; }
  bool padded(int64_t p) const { return indices[p] == I(s.padding_idx); }  // no index is below 0

  // What the sum of bag b is multiplied by.
  float share(int64_t b) const {
    if (!s.mean) return 1;
    int64_t count = end(b) - begin(b);
    if (s.padding_idx >= 0)
      for (int64_t p = begin(b); p < end(b); ++p) count -= padded(p);
    return count ? 1 / float(count) : 0;
  }

  // Throws unless all indices are rows and the offsets begin at 0, never fall and end within the indices.
  void check(const char* op) const {
    const auto refuse = [&](const std::string& rule, int64_t got) {
      throw std::invalid_argument(std::string(op) + ": " + rule + ", got " + std::to_string(got));
    };
    if (offsets && s.offsets && offsets[0] != 0) refuse("offsets must begin at 0", offsets[0]);
    if (offsets && s.offsets > s.bags && offsets[s.bags] != s.indices)
      refuse("offsets must end at the number of indices " + std::to_string(s.indices), offsets[s.bags]);
    for (int64_t b = 1; b < s.offsets; ++b) {
      if (offsets[b] < offsets[b - 1]) refuse("offsets must not decrease", offsets[b]);
      if (offsets[b] > s.indices)
        refuse("offsets must not exceed the number of indices " + std::to_string(s.indices), offsets[b]);
    }
    if (s.bags == 0 && s.indices) refuse("indices must be none where there is no bag", s.indices);
    // Not over threads: waking one takes as long as reading a megabyte or so.
    using Unsigned = std::make_unsigned_t<I>;
    Unsigned largest = 0;
    for (int64_t p = 0; p < s.indices; ++p) largest = std::max(largest, Unsigned(indices[p]));
    if (s.indices == 0 || (largest <= Unsigned(std::numeric_limits<I>::max()) && int64_t(largest) < s.rows))
      return;
    for (int64_t p = 0; p < s.indices; ++p)
      if (indices[p] < 0 || int64_t(indices[p]) >= s.rows)
        refuse("indices must be at least 0 and below " + std::to_string(s.rows), indices[p]);
  }

  // Calls body(begin, end) for runs of bags, of about kChunk indices.
  template <class Body>
  void for_each_run(int64_t work, int threads, Body body) const {
    const int64_t run = std::max(int64_t{1}, kChunk * s.bags / std::max(int64_t{1}, s.indices));
    const int64_t runs = (s.bags + run - 1) / run;
    parallel_claim(runs, work, threads, [&](auto next, int) {
      for (int64_t r; (r = next()) < runs;) body(r * run, std::min(s.bags, (r + 1) * run));
    });
  }
};

// The sums over i of scale(i) * row(i)[0, dim), row by row in order: store(d, sums, lanes) takes each vector
// of them. A row that is null is left out; later(i) is one that will be read soon. In blocks of eight
// vectors, as more sums than these would not stay in registers.
template <class Row, class Scale, class Later, class Store>
__attribute__((always_inline)) inline void add_rows(int64_t dim, int64_t count, Row row, Scale scale,
                                                    Later later, Store store) {
  int64_t d = 0;
  const auto block = [&](auto vectors, auto lanes) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    F sums[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const auto *const from = row(i), *const next = later(i);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        if (v * kLanes * sizeof(*next) % kLine == 0) prefetch(next + d + v * kLanes);
      if (!from) continue;
      const auto times = scale(i);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const F values = lanes.load(from + d + v * kLanes);
        if constexpr (std::is_same_v<decltype(scale(i)), float>)
          sums[v] += values * times;
        else
          sums[v] += values;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(d + v * kLanes, sums[v], lanes);
    d += kVectors * kLanes;
  };
  while (d + 8 * kLanes <= dim) block(std::integral_constant<int, 8>{}, AllLanes{});
  if (d + 4 * kLanes <= dim) block(std::integral_constant<int, 4>{}, AllLanes{});
  if (d + 2 * kLanes <= dim) block(std::integral_constant<int, 2>{}, AllLanes{});
  if (d + kLanes <= dim) block(std::integral_constant<int, 1>{}, AllLanes{});
  if (d < dim) block(std::integral_constant<int, 1>{}, FirstLanes{int(dim - d)});
}
struct One {};  // a scale that multiplies nothing

inline int bits_for(uint64_t largest) {
  int bits = 0;
  while (bits < 64 && largest >> bits) ++bits;
  return bits;
}

// Indices sorted by row, those of a row in their own order; padding is left out.
template <class T, class I>
class SortedBags {
 public:
  SortedBags(const TypedBags<T, I>& bags, int threads) : bags_(bags) {
    const EmbeddingBagShape& s = bags.s;
    shift_ = bits_for(uint64_t(bags.weights ? s.indices : s.bags));
    entries_.reset(new uint64_t[s.indices]);
    spare_.reset(new uint64_t[s.indices]);
    if (bags.weights) bag_of_.reset(new int64_t[s.indices]);
    if (s.mean) share_of_.reset(new float[s.bags]);
    const auto fill = [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        if (s.mean) share_of_[b] = bags.share(b);
        for (int64_t p = bags.begin(b); p < bags.end(b); ++p) {
          // Padding is sorted behind the last row.
          const uint64_t row = bags.padded(p) ? uint64_t(s.rows) : uint64_t(bags.indices[p]);
          entries_[p] = row << shift_ | uint64_t(bags.weights ? p : b);
          if (bags.weights) bag_of_[p] = b;
        }
      }
    };
    sort(fill, bits_for(uint64_t(s.rows)), threads);
    for (count_ = s.indices; s.padding_idx >= 0 && count_ && row(count_ - 1) == s.rows;) --count_;
  }

  int64_t row(int64_t i) const { return int64_t(entries_[i] >> shift_); }
  int64_t count() const { return count_; }
  int64_t ahead() const { return ahead_; }
  int64_t bag(int64_t i) const { return bags_.weights ? bag_of_[number(i)] : number(i); }

  // The gradient of the row of entry `first`; gives where its entries end. meet(i) is called for each of them
  // beforehand, and store takes vectors as in add_rows().
  template <class Meet, class Store>
  __attribute__((always_inline)) int64_t gradient(const T* dout, int64_t first, Meet meet,
                                                  Store store) const {
    int64_t last = first;
    do meet(last++);
    while (last < count_ && row(last) == row(first));
    const int64_t dim = bags_.s.dim, end = count_ - 1, ahead = first + ahead_;
    const auto from = [&](int64_t i) { return dout + bag(first + i) * dim; };
    const auto later = [&](int64_t i) { return dout + bag(std::min(ahead + i, end)) * dim; };
    const auto with = [&](auto scale) { add_rows(dim, last - first, from, scale, later, store); };
    if (bags_.weights)
      with([&](int64_t i) { return to_float(bags_.weights[number(first + i)]); });
    else if (share_of_)
      with([&](int64_t i) { return share_of_[number(first + i)]; });
    else
      with([](int64_t) { return One{}; });
    return last;
  }

  // Calls body(first) for the first entry of every row, and takes from it where those of the next one begin.
  // Chunks go to whoever is free; a row belongs to the chunk in which it begins. ready(body) is called once
  // in each thread, so that it has room of its own.
  template <class Ready>
  void for_each_row(int threads, Ready ready) const {
    const int64_t chunks = (count_ + kChunk - 1) / kChunk;
    parallel_claim(chunks, count_ * bags_.s.dim, threads, [&](auto next, int) {
      ready([&](auto body) {
        for (int64_t chunk; (chunk = next()) < chunks;) {
          int64_t i = chunk * kChunk;
          const int64_t end = std::min(count_, i + kChunk);
          while (i && i < end && row(i) == row(i - 1)) ++i;
          while (i < end) i = body(i);
        }
      });
    });
  }

 private:
  int64_t number(int64_t i) const { return int64_t(entries_[i] & ((uint64_t{1} << shift_) - 1)); }

  template <class Fill>
  void sort(Fill fill, int bits, int threads) {
    constexpr int kMostBits = 11;  // of a digit: 2048 lines written to in turn, for the second-level cache
    const int passes = (bits + kMostBits - 1) / kMostBits;
    const int width = passes ? (bits + passes - 1) / passes : 0;
    const int64_t n = bags_.s.indices, digits = int64_t{1} << width;
    if (n * passes < kSerialWork) threads = 1;
    std::unique_ptr<int64_t[]> counts(new int64_t[threads * digits]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
      const int64_t begin = n * me / team, end = n * (me + 1) / team;
      fill(bags_.s.bags * me / team, bags_.s.bags * (me + 1) / team);
#pragma omp barrier
      std::unique_ptr<int64_t[]> place(new int64_t[digits]);
      uint64_t *from = entries_.get(), *to = spare_.get();
      for (int pass = 0; pass < passes; ++pass, std::swap(from, to)) {
        const int low = shift_ + pass * width;
        const auto digit = [&](uint64_t entry) { return int64_t(entry >> low) & (digits - 1); };
        int64_t* const mine = counts.get() + me * digits;
        std::fill(mine, mine + digits, 0);
        for (int64_t i = begin; i < end; ++i) ++mine[digit(from[i])];
#pragma omp barrier
        int64_t sum = 0;
        for (int64_t d = 0; d < digits; ++d)
          for (int64_t t = 0; t < team; ++t) {
            if (t == me) place[d] = sum;
            sum += counts[t * digits + d];
          }
        for (int64_t i = begin; i < end; ++i) to[place[digit(from[i])]++] = from[i];
#pragma omp barrier
      }
    }
    if (passes % 2) entries_.swap(spare_);
  }

  const TypedBags<T, I>& bags_;
  const int64_t ahead_ = rows_ahead<T>(bags_.s.dim);
  int shift_;
  int64_t count_;
  std::unique_ptr<uint64_t[]> entries_, spare_;
  std::unique_ptr<int64_t[]> bag_of_;  // by the number of an index
  std::unique_ptr<float[]> share_of_;  // by the number of a bag
};

// Calls run(T, I) with the types of a shape, as values of them.
template <class Run>
void with_types(const EmbeddingBagShape& s, Run run) {
  const auto with = [&](auto element) {
    s.index_dtype == DType::i64 ? run(element, int64_t{}) : run(element, int32_t{});
  };
  s.dtype == DType::f32 ? with(float{}) : s.dtype == DType::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace lspm::cpu
