// What the CUDA kernels of embedding_bag and its update share: bags, and sums of rows by groups of lanes.
//
// A group has as many lanes as a row has vectors of 16 bytes, at most a warp. Places, sorted by the table's
// rows, are cut into chunks, so that a row that stands in most bags does not hold up all others: a group
// adds up a chunk's, row by row. Where a chunk has all places of a row, its sum is whole; else it is a part,
// and the block of the chunk in which the row begins adds up those. So each sum has one owner and one order.
#pragma once
#include <type_traits>

#include "../embedding_bag.h"
#include "common.cuh"

namespace lspm::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// Of a multiprocessor, at least, by the columns of a lane: left to itself, ptxas aims at more and spills.
constexpr int blocks_for(int width) { return width <= 4 ? 3 : 2; }

// int32 or int64.
struct Integers {
  const void* data;
  bool wide;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Bounds {
  int64_t begin, end;
  bool right;  // else the offsets are none, and the bag is as if it were empty
};

// The contract's bags. Below 0 padding_idx is none, and such an index is wrong.
struct GivenBags {
  Integers indices, offsets;
  EmbeddingBagShape s;

  GivenBags(const Bags& bags, const EmbeddingBagShape& shape)
      : indices{bags.indices, shape.index_dtype == DType::i64},
        offsets{bags.offsets, shape.index_dtype == DType::i64},
        s(shape) {}

  __device__ __forceinline__ bool is_row(int64_t index) const { return uint64_t(index) < uint64_t(s.rows); }
  __device__ __forceinline__ bool is_padding(int64_t index) const {
    return index >= 0 && index == s.padding_idx;
  }
  __device__ __forceinline__ bool has_gradient(int64_t row) const { return is_row(row) && !is_padding(row); }

  __device__ __forceinline__ Bounds bounds(int64_t bag) const {
    if (!offsets.data) {
      const int64_t length = s.indices / s.bags;
      return {bag * length, (bag + 1) * length, true};
    }
    const int64_t begin = offsets[bag], end = bag + 1 < s.offsets ? offsets[bag + 1] : s.indices;
    const bool right = 0 <= begin && begin <= end && end <= s.indices && (bag > 0 || begin == 0) &&
                       (bag + 1 < s.bags || end == s.indices);
    return {begin, right ? end : begin, right};
  }
};

// Sums of kWidth columns.
template <int kWidth>
struct ColumnSums {
  float at[kWidth];

  template <class T>
  __device__ __forceinline__ void add(const Vec<T, kWidth>& row, float scale) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) at[e] += to_float(row.at[e]) * scale;
  }
  // Adds up what a warp's groups have; each has it then.
  __device__ __forceinline__ void add_groups() {
    for (int distance = blockDim.x; distance < kWarp; distance *= 2)
#pragma unroll
      for (int e = 0; e < kWidth; ++e) at[e] += __shfl_xor_sync(kAllLanes, at[e], distance);
  }
  // Adds up what a block's warps have, of which each has its groups' sum; the first warp has it then. Every
  // thread calls; of_warps has kWidth * kThreads elements and may be used again at once.
  __device__ __forceinline__ void add_warps(float* of_warps) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) of_warps[e * kThreads + thread] = at[e];
    __syncthreads();
    if (thread < kWarp)
      for (int other = kWarp + thread; other < kThreads; other += kWarp)
#pragma unroll
        for (int e = 0; e < kWidth; ++e) at[e] += of_warps[e * kThreads + other];
    __syncthreads();  // before other sums take their place
  }
  template <class T>
  __device__ __forceinline__ void store(T* to) const {
    Vec<T, kWidth> vector;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) vector.at[e] = from_float<T>(at[e]);
    cuda::store(to, vector);
  }
};

// What the gradient of a table's rows is added up from.
template <class T>
struct SortedTerms {
  GivenBags bags;
  const T *dout, *weights;  // the second is null, or of each index
  Integers rows;            // of sorted places
  const int64_t* order;
  const int32_t* bag_of;
  const float* shares;  // null, or of each bag
  float* parts;

  SortedTerms(const void* dout, const Bags& bags, const SortedPlaces& sorted, const EmbeddingBagShape& s)
      : bags(bags, s),
        dout(static_cast<const T*>(dout)),
        weights(static_cast<const T*>(bags.per_sample_weights)),
        rows{sorted.rows, s.index_dtype == DType::i64},
        order(sorted.order),
        bag_of(sorted.bag_of),
        shares(s.mean ? sorted.shares : nullptr),
        parts(sorted.parts) {}

  // Where the part of a row lies that begins in a chunk or goes on there.
  __device__ __forceinline__ float* part(int64_t chunk, bool begins) const {
    return parts + (2 * chunk + begins) * bags.s.dim;
  }
  // Whether the places of a row begin at a sorted place.
  __device__ __forceinline__ bool begins_at(int64_t i, int64_t row) const {
    return i == 0 || rows[i - 1] != row;
  }

  // Calls whole(row, sums) for the columns from d on of each row whose places all lie in a chunk, also where
  // d is none; stores what the chunk has of the others.
  template <int kWidth, class Whole>
  __device__ __forceinline__ void sum_chunk(int64_t chunk, int64_t d, Whole whole) const {
    constexpr int kInFlight = 4;  // rows that a lane has asked for
    const int64_t first = chunk * kSortedChunk, end = min(first + kSortedChunk, bags.s.indices);
    const bool inside = d < bags.s.dim;
    int64_t row = rows[first];
    bool begins = begins_at(first, row);
    ColumnSums<kWidth> sums = {};
#pragma unroll 1
    for (int64_t i = first; i <= end; i += kInFlight) {
      // Place by place they would be waited for one after the other.
      int64_t of[kInFlight], places[kInFlight], in[kInFlight];
      float scales[kInFlight];
      Vec<T, kWidth> terms[kInFlight];
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        of[n] = i + n < end ? rows[i + n] : -1;
        places[n] = i + n < end ? order[i + n] : 0;
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) in[n] = inside && bags.has_gradient(of[n]) ? bag_of[places[n]] : -1;
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        scales[n] = 0.0f;
        terms[n] = {};
        if (in[n] < 0) continue;  // no gradient, or the offsets are none
        terms[n] = load<kWidth>(dout + in[n] * bags.s.dim + d);
        scales[n] = weights ? to_float(weights[places[n]]) : shares ? shares[in[n]] : 1.0f;
      }
#pragma unroll 1  // as `whole` may be long; so the next term moves up into the first one's place
      for (int64_t at = i; at <= min(end, i + kInFlight - 1); ++at) {
        if (at == end || of[0] != row) {
          const bool ends = at < end || end == bags.s.indices || rows[end] != row;
          const bool counts = bags.has_gradient(row);
          if (counts && begins && ends)
            whole(row, sums);
          else if (counts && inside)
            sums.store(part(chunk, begins) + d);
          row = of[0];
          begins = true;
          sums = {};
        }
        sums.add(terms[0], scales[0]);
#pragma unroll
        for (int n = 1; n < kInFlight; ++n) {
          of[n - 1] = of[n];
          scales[n - 1] = scales[n];
          terms[n - 1] = terms[n];
        }
      }
    }
  }

  // The row that begins in a chunk and goes on in the next one, or -1.
  __device__ __forceinline__ int64_t row_that_goes_on(int64_t chunk) const {
    const int64_t first = chunk * kSortedChunk, end = first + kSortedChunk;
    const int64_t row = rows[end - 1];
    const bool begins = rows[first] != row || begins_at(first, row);
    return begins && rows[end] == row && bags.has_gradient(row) ? row : -1;
  }
  // The last chunk that has places of a row which go on after `chunk`.
  __device__ __forceinline__ int64_t last_chunk(int64_t chunk, int64_t row) const {
    int64_t begin = (chunk + 1) * kSortedChunk;
    for (int64_t end = bags.s.indices; begin < end;) {
      const int64_t middle = (begin + end) / 2;
      if (rows[middle] == row)
        begin = middle + 1;
      else
        end = middle;
    }
    return (begin - 1) / kSortedChunk;
  }
  // The sum of the parts in chunks `chunk` to `last`, of which the first begins the row; the first warp's
  // groups have it. Every thread of a block calls.
  template <int kWidth>
  __device__ __forceinline__ ColumnSums<kWidth> sum_parts(int64_t chunk, int64_t last, int64_t d,
                                                          float* of_warps) const {
    ColumnSums<kWidth> sums = {};
#pragma unroll 4
    for (int64_t at = chunk + threadIdx.y; at <= last; at += blockDim.y)
      if (d < bags.s.dim) sums.add(load<kWidth>(part(at, at == chunk) + d), 1.0f);
    sums.add_groups();
    sums.add_warps(of_warps);
    return sums;
  }
};

namespace {  // a kernel of each file that includes this

// One over the number of indices of each bag.
__global__ void __launch_bounds__(kThreads) embedding_bag_shares_kernel(const GivenBags bags, float* shares) {
  const int64_t bag = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (bag >= bags.s.bags) return;
  const Bounds of = bags.bounds(bag);
  int64_t taken = 0;
  for (int64_t place = of.begin + threadIdx.x; place < of.end; place += kWarp)
    taken += !bags.is_padding(bags.indices[place]);
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    taken += __shfl_xor_sync(kAllLanes, taken, distance);
  if (threadIdx.x == 0) shares[bag] = 1.0f / float(taken > 0 ? taken : 1);
}

}  // namespace

inline unsigned blocks_of(int64_t count, int64_t of_block) {
  return unsigned((count + of_block - 1) / of_block);
}

inline void shares(const Bags& bags, float* shares, const EmbeddingBagShape& s, cudaStream_t stream) {
  if (s.mean && s.bags)
    launch({blocks_of(s.bags, kWarps), dim3(kWarp, kWarps), 0, stream}, embedding_bag_shares_kernel,
           GivenBags(bags, s), shares);
}

// Groups of as many lanes as a row has vectors.
inline dim3 block_shape(int64_t vectors) {
  int lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

// Calls body(T, the width of its vectors as a constant, the shape of a block) for a shape.
template <class Body>
void with_width(const char* op, const EmbeddingBagShape& s, bool aligned, Body body) {
  with_types(op, s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    constexpr int kWide = kVectorBytes / sizeof(T);
    if (aligned && s.dim % kWide == 0)
      body(T(), std::integral_constant<int, kWide>(), block_shape(s.dim / kWide));
    else
      body(T(), std::integral_constant<int, 1>(), block_shape(s.dim));
  });
}

}  // namespace lspm::cuda
