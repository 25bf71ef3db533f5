// What the updates of alternating least squares and their loss share: an entry's part in both, and sums over
// a group of lanes.
#pragma once
#include "../mf_als.h"
#include "csr_rows.cuh"

namespace lspm::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLong = 128;  // entries beyond which a row is the whole block's
constexpr int kRun =
    16;  // entries of a group whose sums are added up apart, so that a long sum rounds little

struct Problem : Entries {
  const float* weight;
  MfAlsOptions options;

  __device__ __forceinline__ float value(int64_t entry) const { return values ? values[entry] : 1.0f; }
  // What y y' is multiplied by, and y on the right side.
  __device__ __forceinline__ float of_matrix(int64_t entry) const {
    return options.implicit ? options.alpha * value(entry) : weight ? weight[entry] : 1.0f;
  }
  __device__ __forceinline__ float of_side(int64_t entry) const {
    if (options.implicit) return 1.0f + options.alpha * value(entry);
    return weight ? weight[entry] * value(entry) : value(entry);
  }
  // What an entry's terms are, less what an implicit objective has of them anyway.
  __device__ __forceinline__ float loss(int64_t entry, float product) const {
    const float away = (options.implicit ? 1.0f : value(entry)) - product;
    if (options.implicit) return of_side(entry) * away * away - product * product;
    return of_matrix(entry) * away * away;
  }
  __device__ __forceinline__ float reg(int64_t count) const {
    if (options.reg_exponent == 0.0f) return options.reg;
    return float(options.reg * exp2(options.reg_exponent * log2(double(count))));  // pow would be a call
  }
};

// The sum over a group's lanes.
__device__ __forceinline__ float group_sum(float value) {
  for (int distance = blockDim.x / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}
template <int kValues, int kWidth>
__device__ __forceinline__ float dot(const Values<kValues, kWidth>& a, const Values<kValues, kWidth>& b) {
  float product = 0.0f;
#pragma unroll
  for (int n = 0; n < kValues; ++n) product += a.at[n] * b.at[n];
  return group_sum(product);
}

}  // namespace lspm::cuda
