// Embedding bags, and the gradients of the table and of per_sample_weights.
//
// Forward: a warp owns a bag of few indices, the whole block one of many; each group of lanes takes every
// n-th index and has several rows on their way at once. The gradient of the table is added up as bags.cuh
// says, and each row in bags is written once; the others are 0 beforehand. A group of lanes multiplies the
// row of an index with its bag's gradient, which is that of its weight. Shuffles and shared memory bring the
// groups' sums together in a fixed order. Bytes, with rows of b bytes: forward b an index and b a bag;
// backward of the table b and 16 to 20 an index and b a row in bags, of weights 2 b an index.
#include "bags.cuh"

namespace lspm::cuda {
namespace {

constexpr int kLong = 512;    // indices beyond which a bag is the whole block's
constexpr int kInFlight = 4;  // rows that a lane has asked for

// What some indices of a bag have added.
template <int kWidth>
struct BagSums {
  ColumnSums<kWidth> columns;
  int64_t taken;

  // Over every step-th place from `first` up to `end`.
  template <class T>
  __device__ __forceinline__ void add(const GivenBags& bags, const T* weight, const T* scales, int64_t first,
                                      int64_t end, int step, int64_t d) {
#pragma unroll 1  // it is unrolled within; more takes registers that ptxas lacks
    for (; first < end; first += kInFlight * step) {
      // Index by index they would be waited for one after the other.
      int64_t indices[kInFlight];
      float times[kInFlight];
      Vec<T, kWidth> rows[kInFlight];
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int64_t place = first + n * step;
        indices[n] = place < end ? bags.indices[place] : bags.s.padding_idx;
        times[n] = place < end && scales ? to_float(scales[place]) : 1.0f;
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const bool own = first + n * step < end && !bags.is_padding(indices[n]);
        const bool known = own && bags.is_row(indices[n]);
        taken += own;
        times[n] = known ? times[n] : own ? NAN : 0.0f;
        rows[n] = {};
        if (known && d < bags.s.dim) rows[n] = load<kWidth>(weight + indices[n] * bags.s.dim + d);
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) columns.add(rows[n], times[n]);
    }
    columns.add_groups();
  }
  template <class T>
  __device__ __forceinline__ void write(T* out, bool mean, bool right) const {
    const float share = !right ? NAN : mean && taken > 1 ? 1.0f / float(taken) : 1.0f;
    ColumnSums<kWidth> scaled = {};
#pragma unroll
    for (int e = 0; e < kWidth; ++e) scaled.at[e] = columns.at[e] * share;
    scaled.store(out);
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_for(kWidth))
    embedding_bag_forward_kernel(const T* __restrict__ weight, const GivenBags bags,
                                 const T* __restrict__ scales, T* __restrict__ out) {
  SHARED(float, of_warps, [kWidth * kThreads]);
  SHARED(Bounds, bounds, [kWarps]);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kWarps;
  const int count = int(min(int64_t(kWarps), bags.s.bags - first));
  if (thread < count) bounds[thread] = bags.bounds(first + thread);
  __syncthreads();
  const auto is_long = [&](int n) { return bounds[n].end - bounds[n].begin > kLong; };
  const int groups = kWarp / blockDim.x, group = threadIdx.y % groups;  // of a warp
  const auto count_groups = [&](int64_t taken) {
    for (int distance = blockDim.x; distance < kWarp; distance *= 2)
      taken += __shfl_xor_sync(kAllLanes, taken, distance);
    return taken;
  };
  for (int64_t tile = 0; tile < bags.s.dim; tile += int64_t(blockDim.x) * kWidth) {
    const int64_t d = tile + int(threadIdx.x) * kWidth;
    T* const to = out + (first * bags.s.dim + d);
    const auto write = [&](const BagSums<kWidth>& sums, int n) {
      if (group == 0 && d < bags.s.dim) sums.write(to + n * bags.s.dim, bags.s.mean, bounds[n].right);
    };
    if (warp < count && !is_long(warp)) {
      BagSums<kWidth> sums = {};
      sums.add(bags, weight, scales, bounds[warp].begin + group, bounds[warp].end, groups, d);
      sums.taken = count_groups(sums.taken);
      write(sums, warp);
    }
    for (int n = 0; n < count; ++n) {
      if (!is_long(n)) continue;
      BagSums<kWidth> sums = {};
      sums.add(bags, weight, scales, bounds[n].begin + threadIdx.y, bounds[n].end, blockDim.y, d);
      sums.columns.add_warps(of_warps);
      sums.taken = count_groups(sums.taken);
      SHARED(int64_t, taken_by, [kWarps]);
      if (thread % kWarp == 0) taken_by[warp] = sums.taken;
      __syncthreads();
      if (warp == 0) {
        for (int other = 1; other < kWarps; ++other) sums.taken += taken_by[other];
        write(sums, n);
      }
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_for(kWidth))
    embedding_bag_chunks_kernel(const SortedTerms<T> terms, T* __restrict__ dweight) {
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, dim = terms.bags.s.dim;
  if (chunk * kSortedChunk >= terms.bags.s.indices) return;
  for (int64_t d = int(threadIdx.x) * kWidth; d < dim; d += int64_t(blockDim.x) * kWidth)
    terms.template sum_chunk<kWidth>(
        chunk, d, [&](int64_t row, const ColumnSums<kWidth>& sums) { sums.store(dweight + row * dim + d); });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    embedding_bag_parts_kernel(const SortedTerms<T> terms, T* __restrict__ dweight) {
  SHARED(float, of_warps, [kWidth * kThreads]);
  const int64_t chunk = blockIdx.x, dim = terms.bags.s.dim;
  const int64_t row = terms.row_that_goes_on(chunk);
  if (row < 0) return;
  const int64_t last = terms.last_chunk(chunk, row);
  for (int64_t tile = 0; tile < dim; tile += int64_t(blockDim.x) * kWidth) {
    const int64_t d = tile + int(threadIdx.x) * kWidth;
    const auto sums = terms.template sum_parts<kWidth>(chunk, last, d, of_warps);
    if (threadIdx.y == 0 && d < dim) sums.store(dweight + row * dim + d);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    embedding_bag_weights_kernel(const T* __restrict__ dout, const T* __restrict__ weight,
                                 const GivenBags bags, const int32_t* __restrict__ bag_of,
                                 T* __restrict__ dweights) {
  const int64_t place = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, dim = bags.s.dim;
  const bool exists = place < bags.s.indices;  // the others still take part in sums
  const int64_t index = exists ? bags.indices[place] : 0, bag = exists ? bag_of[place] : -1;
  const bool own = exists && !bags.is_padding(index), known = own && bags.is_row(index) && bag >= 0;
  float sums[kWidth] = {};
  for (int64_t d = int(threadIdx.x) * kWidth; known && d < dim; d += int64_t(blockDim.x) * kWidth) {
    const Vec<T, kWidth> row = load<kWidth>(weight + index * dim + d);
    const Vec<T, kWidth> gradient = load<kWidth>(dout + bag * dim + d);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums[e] += to_float(row.at[e]) * to_float(gradient.at[e]);
  }
  float total = sums[0];
#pragma unroll
  for (int e = 1; e < kWidth; ++e) total += sums[e];
  for (int distance = blockDim.x / 2; distance > 0; distance /= 2)
    total += __shfl_xor_sync(kAllLanes, total, distance);
  if (threadIdx.x == 0 && exists) dweights[place] = from_float<T>(own && !known ? NAN : total);
}

}  // namespace

void embedding_bag_forward(const void* weight, const Bags& bags, void* out, const EmbeddingBagShape& s,
                           int device, void* stream) {
  with_width(
      "embedding_bag_forward", s, aligned_for_vectors(weight, out), [&](auto of, auto width, dim3 block) {
        using T = decltype(of);
        if (s.bags == 0 || s.dim == 0) return;
        const DeviceGuard guard(device);
        launch({blocks_of(s.bags, kWarps), block, 0, cudaStream_t(stream)},
               embedding_bag_forward_kernel<T, decltype(width)::value>, static_cast<const T*>(weight),
               GivenBags(bags, s), static_cast<const T*>(bags.per_sample_weights), static_cast<T*>(out));
      });
}

void embedding_bag_backward(const void* dout, const void* weight, const Bags& bags,
                            const SortedPlaces& sorted, void* dweight, void* dweights,
                            const EmbeddingBagShape& s, int device, void* stream) {
  const bool aligned = aligned_for_vectors(dout, weight, sorted.parts, dweight);
  with_width("embedding_bag_backward", s, aligned, [&](auto of, auto width, dim3 block) {
    using T = decltype(of);
    constexpr int kWidth = decltype(width)::value;
    if (s.indices == 0) return;
    const DeviceGuard guard(device);
    const auto on = cudaStream_t(stream);
    if (dweight && s.dim) {
      shares(bags, sorted.shares, s, on);
      const SortedTerms<T> terms(dout, bags, sorted, s);
      const int64_t chunks = (s.indices + kSortedChunk - 1) / kSortedChunk;
      launch({blocks_of(chunks, block.y), block, 0, on}, embedding_bag_chunks_kernel<T, kWidth>, terms,
             static_cast<T*>(dweight));
      if (chunks > 1)
        launch({unsigned(chunks - 1), block, 0, on}, embedding_bag_parts_kernel<T, kWidth>, terms,
               static_cast<T*>(dweight));
    }
    if (dweights)
      launch({blocks_of(s.indices, block.y), block, 0, on}, embedding_bag_weights_kernel<T, kWidth>,
             static_cast<const T*>(dout), static_cast<const T*>(weight), GivenBags(bags, s), sorted.bag_of,
             static_cast<T*>(dweights));
  });
}

}  // namespace lspm::cuda
