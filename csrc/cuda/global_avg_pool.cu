// The mean of every channel of an image, channels last.
//
// Forward: a block owns 32 vectors of up to 16 bytes of channels of one image; its 8 rows of threads take
// every eighth pixel each, in runs whose sums are added, so that a sum of many pixels rounds little, and
// shared memory brings the threads' sums together in order. Backward: a thread owns a
// vector of one pixel. Bytes per element of s bytes: s either way.
#include "../global_avg_pool.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

constexpr int kRows = 8;
constexpr int kThreads = kRows * kWarp;
constexpr int kRun = 32;    // pixels of a thread
constexpr int kBlocks = 4;  // of a multiprocessor, at least: left to itself, ptxas aims at 5 and spills

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    global_avg_pool_forward_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t parts, int64_t pixels,
                                   int64_t channels) {
  using Sums = Vec<float, kWidth>;
  SHARED(Sums, tile, [kThreads]);
  const int64_t image = blockIdx.x / parts;
  const int64_t channel = (blockIdx.x % parts * kWarp + threadIdx.x) * kWidth;
  const bool own = channel < channels;  // threads past the last channel still meet the others
  Sums sums = {};
  for (int64_t first = threadIdx.y; own && first < pixels; first += kRows * kRun) {
    const int64_t end = min(pixels, first + kRows * kRun);
    Sums run = {};
    for (int64_t p = first; p < end; p += kRows) {
      const Vec<T, kWidth> pixel = load<kWidth>(x + (image * pixels + p) * channels + channel);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) run.at[e] += to_float(pixel.at[e]);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums.at[e] += run.at[e];
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) tile[threadIdx.y * kWarp + threadIdx.x].at[e] = sums.at[e];
  __syncthreads();
  if (threadIdx.y > 0 || !own) return;
  Vec<T, kWidth> mean;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    float total = sums.at[e];
    for (int row = 1; row < kRows; ++row) total += tile[row * kWarp + threadIdx.x].at[e];
    mean.at[e] = from_float<T>(total / pixels);
  }
  store(y + image * channels + channel, mean);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    global_avg_pool_backward_kernel(const T* __restrict__ dy, T* __restrict__ dx, int64_t owned,
                                    int64_t pixels, int64_t channels) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, vectors = channels / kWidth;
  if (index >= owned) return;
  const int64_t image = index / vectors / pixels;
  Vec<T, kWidth> mean = load<kWidth>(dy + image * channels + index % vectors * kWidth);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) mean.at[e] = from_float<T>(to_float(mean.at[e]) / pixels);
  store(dx + index * kWidth, mean);
}

}  // namespace

void global_avg_pool_forward(const void* x, void* y, const GlobalAvgPoolShape& s, int device, void* stream) {
  with_types("global_avg_pool_forward", s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    if (s.batch == 0 || s.channels == 0) return;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool wide = s.channels % kWidth == 0 && aligned_for_vectors(x, y);
    auto* kernel = wide ? global_avg_pool_forward_kernel<T, kWidth> : global_avg_pool_forward_kernel<T, 1>;
    const int64_t part = kWarp * (wide ? kWidth : 1), parts = (s.channels + part - 1) / part;
    const DeviceGuard guard(device);
    launch({unsigned(s.batch * parts), dim3(kWarp, kRows), 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(x), static_cast<T*>(y), parts, s.pixels, s.channels);
  });
}

void global_avg_pool_backward(const void* dy, void* dx, const GlobalAvgPoolShape& s, int device,
                              void* stream) {
  with_types("global_avg_pool_backward", s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    const int64_t elements = s.batch * s.pixels * s.channels;
    if (elements == 0) return;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool wide = s.channels % kWidth == 0 && aligned_for_vectors(dy, dx);
    auto* kernel = wide ? global_avg_pool_backward_kernel<T, kWidth> : global_avg_pool_backward_kernel<T, 1>;
    const int64_t owned = elements / (wide ? kWidth : 1);
    const DeviceGuard guard(device);
    launch({unsigned((owned + kThreads - 1) / kThreads), kThreads, 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(dy), static_cast<T*>(dx), owned, s.pixels, s.channels);
  });
}

}  // namespace lspm::cuda
