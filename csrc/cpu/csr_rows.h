// What kernels share that meet the rows of one factor with the entries of a sparse matrix.
//
// The rows y that a row's entries name are read through pointers, kLanes of them at a time: lane i of a
// vector belongs to the i-th. Missing ones are a row of zeros, and all rows are whole vectors, filled up with
// zeros.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "csr.h"

namespace lspm::cpu {

constexpr int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The vectors of one register block: their four (or fewer) sums share each row's pointer.
constexpr int kBlock = 4;

// Python has checked the same where it could read indptr: between a mistake and memory.
inline void check(const Csr& csr) {
  for (int64_t r = 0; r < csr.rows; ++r)
    if (csr.count(r) < 0) throw std::invalid_argument("indptr must not decrease");
  if (csr.indptr[0] != 0 || csr.indptr[csr.rows] != csr.entries)
    throw std::invalid_argument("indptr must go from 0 to the number of indices");
}

using Floats = std::unique_ptr<float[]>;
inline Floats zeros(int64_t n) { return Floats(new float[std::max<int64_t>(n, 1)]()); }

// A row of k floats with zeros after it, and back.
inline void load_row(const float* from, int64_t k, float* to) {
  std::memcpy(to, from, k * sizeof(float));
  std::fill(to + k, to + whole_vectors(k), 0.0f);
}
inline void store_row(const float* from, int64_t k, float* to) { std::memcpy(to, from, k * sizeof(float)); }

// The other factor's rows as whole vectors: itself where they are, else a copy, of the rows that the entries
// name where that is less.
class Rows {
 public:
  const int64_t stride;

  Rows(const float* from, int64_t k, const Csr& csr, int threads)
      : stride(whole_vectors(k)), csr_(csr), data_(from), nothing_(zeros(stride)) {
    if (stride == k) return;
    by_entry_ = csr.entries < csr.columns;
    const int64_t rows = by_entry_ ? csr.entries : csr.columns;
    copy_.reset(new float[std::max<int64_t>(rows * stride, 1)]);
    data_ = copy_.get();
    parallel_for(rows, rows * k, threads, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const int64_t row = by_entry_ ? csr.column(begin) : begin;
        if (valid(row)) load_row(from + row * k, k, copy_.get() + begin * stride);
      }
    });
  }

  // Appends the rows that row's entries name to `to`, up to a multiple of kLanes; false where one is none.
  bool append(int64_t row, std::vector<const float*>& to) const {
    const int64_t begin = csr_.indptr[row], n = csr_.count(row);
    const size_t at = to.size();
    to.resize(at + whole_vectors(n), nothing_.get());
    bool all = true;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t column = csr_.column(begin + i);
      all &= valid(column);
      to[at + i] = data_ + (by_entry_ ? begin + i : column) * stride;
    }
    return all;
  }

 private:
  bool valid(int64_t column) const { return uint64_t(column) < uint64_t(csr_.columns); }

  const Csr& csr_;
  const float* data_;
  Floats copy_, nothing_;
  bool by_entry_ = false;
};

// Element i of a vector of entries' values: of up to kLanes from `entry` on, 1 where there are no values, and
// 0 past the row's end.
inline F values_at(const float* values, int64_t entry, int64_t end) {
  const int64_t n = end - entry;
  if (!values) return first_lanes(broadcast(1.0f), n, F{});
  return n >= kLanes ? load(values + entry) : FirstLanes{int(n)}.load(values + entry);
}

// Lane i: <rows[i], x>.
inline F dots(const float* const* rows, const float* x, int64_t stride) {
  F sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kBlock * kLanes <= stride; c += kBlock * kLanes) {
    F block[kBlock];
    for (int v = 0; v < kBlock; ++v) block[v] = load(x + c + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const float* row = rows[i] + c;
      F part = kLanes > 4 ? sums[i] : F{};  // narrow vectors' sums are long, and rounding grows with it
#pragma GCC unroll 4
      for (int v = 0; v < kBlock; ++v) part += load(row + v * kLanes) * block[v];
      sums[i] = kLanes > 4 ? part : sums[i] + part;
    }
  }
  for (; c < stride; c += kLanes) {
    const F part = load(x + c);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] += load(rows[i] + c) * part;
  }
  return sums_of(sums);
}

template <int kVectors, int kTargets>
inline void add_scaled_block(const float* const* rows, const float (&scales)[kTargets][kLanes],
                             float* const (&to)[kTargets], int64_t c) {
  constexpr int kSplit = kTargets == 1 ? 2 : 1;  // else too few chains of additions are under way
  F sums[kSplit][kTargets][kVectors] = {};
  for (int i = 0; i < kLanes; i += kSplit)
#pragma GCC unroll 2
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F row = load(rows[i + s] + c + v * kLanes);
#pragma GCC unroll 2
        for (int t = 0; t < kTargets; ++t) sums[s][t][v] += broadcast(scales[t][i + s]) * row;
      }
  for (int t = 0; t < kTargets; ++t)
    for (int v = 0; v < kVectors; ++v) {
      float* at = to[t] + c + v * kLanes;
      F sum = sums[0][t][v];
      if constexpr (kSplit == 2) sum += sums[1][t][v];
      store(at, load(at) + sum);
    }
}

// to[t] += the sum over i of scales[t] in lane i times rows[i].
template <int kTargets>
void add_scaled(const float* const* rows, const F (&scales)[kTargets], float* const (&to)[kTargets],
                int64_t stride) {
  float lanes[kTargets][kLanes];
  for (int t = 0; t < kTargets; ++t) store(lanes[t], scales[t]);
  int64_t c = 0;
  for (; c + kBlock * kLanes <= stride; c += kBlock * kLanes)
    add_scaled_block<kBlock, kTargets>(rows, lanes, to, c);
  for (; c < stride; c += kLanes) add_scaled_block<1, kTargets>(rows, lanes, to, c);
}

// Hands out runs of rows of about the same cost to work = make(), one for each thread: work(begin, end). An
// entry costs 1, a row kRowCost besides. Which runs there are depends on the matrix alone.
template <class Make>
void for_runs_of_rows(const Csr& csr, int64_t k, int threads, Make make) {
  constexpr int64_t kRowCost = 16, kRuns = 512, kLeast = 128;
  const int64_t cost = csr.entries + csr.rows * kRowCost, size = std::max(kLeast, cost / kRuns);
  const int64_t runs = (cost + size - 1) / size;
  const auto first_row = [&](int64_t run) {  // whose entries begin at this cost or later
    int64_t low = 0, high = csr.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (csr.indptr[middle] + middle * kRowCost < run * size)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel_claim(runs, cost * k, threads, [&](auto next, int) {
    auto work = make();
    for (int64_t i = next(); i < runs; i = next()) work(first_row(i), first_row(i + 1));
  });
}

}  // namespace lspm::cpu
