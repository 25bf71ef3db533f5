// What the updates of a factor's rows by their entries share: how rows are dealt out to blocks, and the row
// of the other factor that an entry names, spread over a group of lanes. A group has as many lanes as a row
// has vectors of up to 16 bytes, but at most a warp; threadIdx.x counts them, and threadIdx.y the groups.
#pragma once
#include "../csr.h"
#include "common.cuh"

namespace lspm::cuda {

constexpr int kMostRows = 32;      // of a block
constexpr int kManyBlocks = 1024;  // so many before a block takes several rows

inline int rows_of_block(int64_t rows) {
  const int64_t shared_out = rows / kManyBlocks;
  return int(shared_out < 1 ? 1 : shared_out < kMostRows ? shared_out : kMostRows);
}

// Of a group: the least power of two that has a lane for each of a row's vectors, or a warp.
inline int lanes_of(int64_t vectors) {
  int lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  return lanes;
}

// The entries' side of an update; columns that are none count as rows of zeros.
struct Entries {
  const float *other_factors, *values;
  Csr csr;
  int64_t k;

  // The column that an entry names, or -1.
  __device__ __forceinline__ int64_t column(int64_t entry) const {
    const int64_t column = csr.wide ? static_cast<const int64_t*>(csr.indices)[entry]
                                    : static_cast<const int32_t*>(csr.indices)[entry];
    return uint64_t(column) < uint64_t(csr.columns) ? column : -1;
  }
  // The row of y that it names, or null.
  __device__ __forceinline__ const float* row_of(int64_t entry) const {
    const int64_t of_entry = column(entry);
    return of_entry >= 0 ? other_factors + of_entry * k : nullptr;
  }
};

// A lane's factors of a row: kValues of them, in vectors of kWidth.
template <int kValues, int kWidth>
struct Values {
  float at[kValues];

  // Calls body(n, k) for a vector that begins with the lane's n-th factor, which is the row's k-th.
  template <class Body>
  __device__ __forceinline__ static void for_each_vector(int64_t cols, Body body) {
#pragma unroll
    for (int n = 0; n < kValues; n += kWidth) {
      const int k = n * kWarp + int(threadIdx.x) * kWidth;  // with several vectors, the group is a warp
      if (k < cols) body(n, k);
    }
  }
  __device__ __forceinline__ void load(const float* row, int64_t cols) {
    for_each_vector(cols, [&](int n, int k) {
      const Vec<float, kWidth> vector = cuda::load<kWidth>(row + k);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) at[n + e] = vector.at[e];
    });
  }
  __device__ __forceinline__ void store(float* row, int64_t cols) const {
    for_each_vector(cols, [&](int n, int k) {
      Vec<float, kWidth> vector;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) vector.at[e] = at[n + e];
      cuda::store(row + k, vector);
    });
  }
  // Adds up what a warp's groups of lanes have; each has it then.
  __device__ __forceinline__ void add_groups() {
    for (int distance = blockDim.x; distance < kWarp; distance *= 2)
#pragma unroll
      for (int n = 0; n < kValues; ++n) at[n] += __shfl_xor_sync(kAllLanes, at[n], distance);
  }
};

}  // namespace lspm::cuda
