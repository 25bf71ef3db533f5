// Max pooling of images, channels last.
//
// A thread owns up to 16 bytes of channels of a pixel, of y in the forward and of dx in the backward, which
// gathers: it adds the gradients of the windows that took an element, in their order, without atomics. What
// windows share comes from the caches. No shared memory.
// Bytes per element of y of s bytes: forward (stride ** 2 + 1) s and one of positions; backward the same.
#include "../max_pool2d.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

constexpr int kThreads = 128;
// Blocks of a multiprocessor, at least. Left to itself, ptxas aims at more and spills.
constexpr int kBlocks = 4;

// What a thread owns: image, row and column of a pixel of rows x cols, and its first channel.
struct Place {
  int64_t image, row, col, channel;

  __device__ Place(int64_t index, int64_t vectors, int64_t rows, int64_t cols, int width)
      : image(index / vectors / cols / rows),
        row(index / vectors / cols % rows),
        col(index / vectors % cols),
        channel(index % vectors * width) {}
};

template <class T, class P, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_pool2d_forward_kernel(const T* __restrict__ x, T* __restrict__ y, P* __restrict__ positions,
                              int64_t owned, int64_t channels, PoolAxis rows, PoolAxis cols) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= owned) return;
  const Place own(index, channels / kWidth, rows.out, cols.out, kWidth);
  const int64_t first_a = rows.first(own.row), end_a = rows.end(own.row);
  const int64_t first_b = cols.first(own.col), end_b = cols.end(own.col);
  Vec<T, kWidth> best;
  float largest[kWidth];
  int taken[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    largest[e] = -INFINITY;
    taken[e] = int(first_a * cols.kernel + first_b);
  }
  for (int64_t a = first_a; a < end_a; ++a)
    for (int64_t b = first_b; b < end_b; ++b) {
      const int64_t i = rows.start(own.row) + a * rows.dilation, j = cols.start(own.col) + b * cols.dilation;
      const Vec<T, kWidth> seen =
          load<kWidth>(x + ((own.image * rows.in + i) * cols.in + j) * channels + own.channel);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float value = to_float(seen.at[e]);
        if (value > largest[e] || value != value) {
          largest[e] = value;
          taken[e] = int(a * cols.kernel + b);
        }
      }
    }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) best.at[e] = from_float<T>(largest[e]);
  store(y + index * kWidth, best);
  if (!positions) return;
  Vec<P, kWidth> places;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) places.at[e] = P(taken[e]);
  store(positions + index * kWidth, places);
}

template <class T, class P, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_pool2d_backward_kernel(const T* __restrict__ dy, const P* __restrict__ positions, T* __restrict__ dx,
                               int64_t owned, int64_t channels, PoolAxis rows, PoolAxis cols) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= owned) return;
  const Place own(index, channels / kWidth, rows.in, cols.in, kWidth);
  float sums[kWidth] = {};
  for (int64_t i = rows.first_window(own.row); i < rows.end_window(own.row); ++i)
    for (int64_t j = cols.first_window(own.col); j < cols.end_window(own.col); ++j) {
      const int64_t a = rows.tap(own.row, i), b = cols.tap(own.col, j);
      if (a < 0 || b < 0) continue;
      const int64_t at = ((own.image * rows.out + i) * cols.out + j) * channels + own.channel;
      const Vec<P, kWidth> taken = load<kWidth>(positions + at);
      const Vec<T, kWidth> gradient = load<kWidth>(dy + at);
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        if (int(taken.at[e]) == int(a * cols.kernel + b)) sums[e] += to_float(gradient.at[e]);
    }
  Vec<T, kWidth> out;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out.at[e] = from_float<T>(sums[e]);
  store(dx + index * kWidth, out);
}

// Calls body(T(), P()) for the types of elements and of positions.
template <class Body>
void with_pool_types(const char* op, const MaxPool2dShape& shape, Body body) {
  with_types(op, shape.dtype, "dtype", shape.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    shape.bytes() ? body(T(), uint8_t()) : body(T(), int32_t());
  });
}

}  // namespace

void max_pool2d_forward(const void* x, void* y, void* positions, const MaxPool2dShape& shape, int device,
                        void* stream) {
  with_pool_types("max_pool2d_forward", shape, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    if (shape.outputs() == 0) return;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool wide = shape.channels % kWidth == 0 && aligned_for_vectors(x, y, positions);
    auto* kernel = wide ? max_pool2d_forward_kernel<T, P, kWidth> : max_pool2d_forward_kernel<T, P, 1>;
    const int64_t owned = shape.outputs() / (wide ? kWidth : 1);
    const DeviceGuard guard(device);
    launch({unsigned((owned + kThreads - 1) / kThreads), kThreads, 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(x), static_cast<T*>(y), static_cast<P*>(positions), owned, shape.channels,
           shape.rows, shape.cols);
  });
}

void max_pool2d_backward(const void* dy, const void* positions, void* dx, const MaxPool2dShape& shape,
                         int device, void* stream) {
  with_pool_types("max_pool2d_backward", shape, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    if (shape.inputs() == 0) return;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool wide = shape.channels % kWidth == 0 && aligned_for_vectors(dy, positions, dx);
    auto* kernel = wide ? max_pool2d_backward_kernel<T, P, kWidth> : max_pool2d_backward_kernel<T, P, 1>;
    const int64_t owned = shape.inputs() / (wide ? kWidth : 1);
    const DeviceGuard guard(device);
    launch({unsigned((owned + kThreads - 1) / kThreads), kThreads, 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(dy), static_cast<const P*>(positions), static_cast<T*>(dx), owned,
           shape.channels, shape.rows, shape.cols);
  });
}

}  // namespace lspm::cuda
