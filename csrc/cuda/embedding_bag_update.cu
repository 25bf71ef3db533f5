// The step of an optimizer with the gradient of an embedding bag's table. Rows of the gradient are added up
// as bags.cuh says; the group of lanes that has a row's sum changes the row at once, so that no gradient is
// stored but the parts of rows that stand in more than one chunk. Adagrad's step takes a row's whole
// gradient: a row of more columns than a group has in registers is added up twice, once for its squares.
// Bytes, with rows of b bytes: b and 16 to 20 an index, 2 b and twice the state a row that changes.
#include <cmath>

#include "../embedding_bag_update.h"
#include "bags.cuh"
#include "philox.cuh"

namespace lspm::cuda {
namespace {

constexpr RowOptimizer kSgd = RowOptimizer::sgd, kAdagrad = RowOptimizer::adagrad, kAdam = RowOptimizer::adam;

struct StepNumbers {
  float lr, eps, grow1, grow2, root, weight_decay;
  bool stochastic;
  uint64_t seed;

  explicit StepNumbers(const RowStep& step)
      : lr(float(step.lr)),
        eps(float(step.eps)),
        grow1(float(1 - step.beta1)),
        grow2(float(1 - step.beta2)),
        root(1),
        weight_decay(float(step.weight_decay)),
        stochastic(step.stochastic),
        seed(step.seed) {
    if (step.optimizer != kAdam) return;
    lr = float(step.lr / (1 - std::pow(step.beta1, double(step.step))));
    root = float(1 / std::sqrt(1 - std::pow(step.beta2, double(step.step))));
  }
};

// The bfloat16 above or below a value, by the high half of a word; what is not finite is as always.
__device__ __forceinline__ float rounded_at_random(float value, uint32_t word) {
  const uint32_t bits = __float_as_uint(value), moved = (bits + (word >> 16)) & 0xffff0000u;
  return (bits & 0x7f800000u) == 0x7f800000u ? value : __uint_as_float(moved);
}

// The lanes of a thread's group, and its first.
__device__ __forceinline__ int first_lane() { return (threadIdx.y * blockDim.x) % kWarp; }
__device__ __forceinline__ unsigned group_mask() {
  return (blockDim.x == kWarp ? kAllLanes : (1u << blockDim.x) - 1) << first_lane();
}

template <RowOptimizer kOptimizer, class T, int kWidth>
struct Table {
  T* weight;
  float *first, *second;
  int64_t dim;
  StepNumbers step;

  // Changes rows. sum(d, whole) calls whole(row, g) for the columns of rows from d on, in the same groups of
  // lanes and for the same rows at every d. `kept` is room for a number of each row.
  template <class Sum>
  __device__ __forceinline__ void change_rows(float* kept, Sum sum) const {
    const int64_t columns = int64_t(blockDim.x) * kWidth;
    const bool twice = kOptimizer == kAdagrad && dim > columns;
    for (int last = !twice; last < 2; ++last)
      for (int64_t tile = 0; tile < dim; tile += columns) {
        const int64_t d = tile + int(threadIdx.x) * kWidth;
        int of = 0;
        sum(d, [&](int64_t row, ColumnSums<kWidth> g) {
          Vec<T, kWidth> old = {};
          if (d < dim) old = load<kWidth>(weight + row * dim + d);
          if (step.weight_decay != 0.0f) g.add(old, step.weight_decay);
          float size = step.lr;
          if constexpr (kOptimizer == kAdagrad) {
            float* const of_row = twice ? kept + of++ : nullptr;
            if (!last) return keep_squares(g, tile == 0, of_row);
            size = size_of_step(row, g, tile == 0, of_row);
          }
          if (d < dim) change(row, d, old, g, size);
        });
      }
  }

 private:
  __device__ __forceinline__ float squares(const ColumnSums<kWidth>& g) const {
    float total = 0.0f;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) total += g.at[e] * g.at[e];
    for (int distance = blockDim.x / 2; distance > 0; distance /= 2)
      total += __shfl_xor_sync(group_mask(), total, distance);
    return total;
  }
  __device__ __forceinline__ void keep_squares(const ColumnSums<kWidth>& g, bool begins, float* kept) const {
    const float total = squares(g);
    if (threadIdx.x == 0) *kept = begins ? total : *kept + total;
  }
  // A row's state is read and changed by the first lane alone. Once changed, it is what is kept.
  __device__ __forceinline__ float size_of_step(int64_t row, const ColumnSums<kWidth>& g, bool begins,
                                                float* kept) const {
    const float total = kept ? 0.0f : squares(g);
    float state = 0.0f;
    if (threadIdx.x == 0) {
      if (begins) {
        state = first[row] + (kept ? *kept : total) / float(dim);
        first[row] = state;
        if (kept) *kept = state;
      } else {
        state = *kept;
      }
    }
    state = __shfl_sync(group_mask(), state, first_lane());
    return step.lr / (sqrtf(state) + step.eps);
  }
  __device__ __forceinline__ void change(int64_t row, int64_t d, const Vec<T, kWidth>& old,
                                         const ColumnSums<kWidth>& g, float size) const {
    const int64_t at = row * dim + d;
    ColumnSums<kWidth> changed;
    if constexpr (kOptimizer == kAdam) {
      Vec<float, kWidth> mean = load<kWidth>(first + at), square = load<kWidth>(second + at);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        mean.at[e] += step.grow1 * (g.at[e] - mean.at[e]);
        square.at[e] += step.grow2 * (g.at[e] * g.at[e] - square.at[e]);
        changed.at[e] =
            to_float(old.at[e]) - size * mean.at[e] / (sqrtf(square.at[e]) * step.root + step.eps);
      }
      store(first + at, mean);
      store(second + at, square);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) changed.at[e] = to_float(old.at[e]) - size * g.at[e];
    }
    if constexpr (std::is_same_v<T, bf16>)
      if (step.stochastic)
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          uint32_t x[4] = {uint32_t((d + e) / 64 * 16 + (d + e) % 16), uint32_t(row),
                           uint32_t(uint64_t(row) >> 32), 0};
          philox(step.seed, x);
          const int word = int((d + e) / 16 % 4);
          const uint32_t low = word & 1 ? x[1] : x[0], high = word & 1 ? x[3] : x[2];
          changed.at[e] = rounded_at_random(changed.at[e], word & 2 ? high : low);
        }
    changed.store(weight + at);
  }
};

template <RowOptimizer kOptimizer, class T, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_for(kWidth))
    embedding_bag_update_chunks_kernel(const SortedTerms<T> terms, const Table<kOptimizer, T, kWidth> table) {
  SHARED(float, kept, [kWarps * kSortedChunk]);  // where rows need it, a group is a warp
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (chunk * kSortedChunk >= terms.bags.s.indices) return;
  table.change_rows(kept + threadIdx.y % kWarps * kSortedChunk,
                    [&](int64_t d, auto whole) { terms.template sum_chunk<kWidth>(chunk, d, whole); });
}

template <RowOptimizer kOptimizer, class T, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_for(kWidth))
    embedding_bag_update_parts_kernel(const SortedTerms<T> terms, const Table<kOptimizer, T, kWidth> table) {
  SHARED(float, of_warps, [kWidth * kThreads]);
  SHARED(float, kept, [1]);
  const int64_t chunk = blockIdx.x;
  const int64_t row = terms.row_that_goes_on(chunk);
  if (row < 0) return;
  const int64_t last = terms.last_chunk(chunk, row);
  table.change_rows(kept, [&](int64_t d, auto whole) {
    const auto sums = terms.template sum_parts<kWidth>(chunk, last, d, of_warps);
    if (threadIdx.y == 0) whole(row, sums);
  });
}

}  // namespace

void embedding_bag_update(void* weight, float* first, float* second, const void* dout, const Bags& bags,
                          const SortedPlaces& sorted, const EmbeddingBagShape& s, const RowStep& step,
                          int device, void* stream) {
  const bool states = step.optimizer == kAdam;  // Adagrad's are numbers, no vectors
  const bool aligned = aligned_for_vectors(weight, dout, sorted.parts, states ? first : nullptr, second);
  with_width("embedding_bag_update", s, aligned, [&](auto of, auto width, dim3 block) {
    using T = decltype(of);
    constexpr int kWidth = decltype(width)::value;
    if (s.indices == 0 || s.dim == 0) return;
    const DeviceGuard guard(device);
    const auto on = cudaStream_t(stream);
    shares(bags, sorted.shares, s, on);
    const SortedTerms<T> terms(dout, bags, sorted, s);
    const int64_t chunks = (s.indices + kSortedChunk - 1) / kSortedChunk;
    const auto run = [&](auto optimizer) {
      constexpr RowOptimizer kOptimizer = decltype(optimizer)::value;
      const Table<kOptimizer, T, kWidth> table{static_cast<T*>(weight), first, second, s.dim,
                                               StepNumbers(step)};
      launch({blocks_of(chunks, block.y), block, 0, on},
             embedding_bag_update_chunks_kernel<kOptimizer, T, kWidth>, terms, table);
      if (chunks > 1)
        launch({unsigned(chunks - 1), block, 0, on}, embedding_bag_update_parts_kernel<kOptimizer, T, kWidth>,
               terms, table);
    };
    switch (step.optimizer) {
      case kSgd:
        return run(std::integral_constant<RowOptimizer, kSgd>());
      case kAdagrad:
        return run(std::integral_constant<RowOptimizer, kAdagrad>());
      case kAdam:
        return run(std::integral_constant<RowOptimizer, kAdam>());
    }
  });
}

}  // namespace lspm::cuda
