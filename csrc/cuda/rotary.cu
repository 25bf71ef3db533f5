// Rotary position embedding (Su et al. 2021).
//
// A block owns one position of a sequence, or several where these are short. A thread owns up to 16 bytes of
// pairs of that position in every blockDim.y-th head: it reads their cosines and sines once, keeps them in
// registers and turns head after head, four of them in flight. No shared memory.
// Bytes per element of s bytes: 2 s.
#include "../rotary.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

constexpr int kThreads = 128;
// Blocks of a multiprocessor, at least. 6 would leave a thread 80 registers, and on sm_100 spills.
constexpr int kBlocks = 4;

// x: (batch, heads, rows, dim) with strides, out: (batch, rows, heads, dim). sign: 1, or -1 for the inverse.
template <class T, class W, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rotary_kernel(const T* __restrict__ x, const W* __restrict__ cos, const W* __restrict__ sin,
                  const int64_t* __restrict__ offsets, T* __restrict__ out, int64_t all_rows, int64_t rows,
                  int64_t heads, int64_t dim, int64_t half, int64_t positions, int64_t batch_stride,
                  int64_t head_stride, int64_t row_stride, int64_t offset, float sign) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
  if (index >= all_rows) return;
  const int64_t sequence = index / rows, row = index % rows;
  const int64_t position = (offsets ? offsets[sequence] : offset) + row;
  const bool known = position >= 0 && position < positions;
  x += sequence * batch_stride + row * row_stride;
  out += index * heads * dim;

  const int64_t stride = int64_t(blockDim.x) * kWidth;
  for (int64_t pair = int64_t(threadIdx.x) * kWidth; pair < half; pair += stride) {
    float c[kWidth], s[kWidth];
    if (known) {
      const Vec<W, kWidth> cosines = load<kWidth>(cos + position * half + pair);
      const Vec<W, kWidth> sines = load<kWidth>(sin + position * half + pair);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        c[e] = to_float(cosines.at[e]);
        s[e] = to_float(sines.at[e]) * sign;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) c[e] = s[e] = NAN;
    }
#pragma unroll 4
    for (int64_t head = threadIdx.y; head < heads; head += blockDim.y) {
      const T* const from = x + head * head_stride;
      T* const to = out + head * dim;
      if constexpr (kInterleaved) {
        // One after the other, as a single element at a time need not be aligned to two.
        Vec<T, kWidth> v[2] = {load<kWidth>(from + 2 * pair), load<kWidth>(from + 2 * pair + kWidth)};
        const auto element = [&](int i) -> T& { return v[i / kWidth].at[i % kWidth]; };
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float a = to_float(element(2 * e)), b = to_float(element(2 * e + 1));
          element(2 * e) = from_float<T>(a * c[e] - b * s[e]);
          element(2 * e + 1) = from_float<T>(b * c[e] + a * s[e]);
        }
        store(to + 2 * pair, v[0]);
        store(to + 2 * pair + kWidth, v[1]);
      } else {
        Vec<T, kWidth> first = load<kWidth>(from + pair), second = load<kWidth>(from + half + pair);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float a = to_float(first.at[e]), b = to_float(second.at[e]);
          first.at[e] = from_float<T>(a * c[e] - b * s[e]);
          second.at[e] = from_float<T>(b * c[e] + a * s[e]);
        }
        store(to + pair, first);
        store(to + half + pair, second);
      }
    }
  }
  for (int64_t col = 2 * half + int64_t(threadIdx.x) * kWidth; col < dim; col += stride)
    for (int64_t head = threadIdx.y; head < heads; head += blockDim.y)
      store(out + head * dim + col, load<kWidth>(x + head * head_stride + col));
}

// Threads over the pairs of a row, over heads, and over positions for as long as there is room.
dim3 block_shape(int64_t pairs, int64_t heads, int64_t positions) {
  const auto fit = [](int64_t wanted, int64_t room) { return unsigned(wanted < room ? wanted : room); };
  constexpr int64_t kHeads = 4;  // that a thread turns by the same angles
  const unsigned x = fit(pairs, kThreads);
  const unsigned y = fit((heads + kHeads - 1) / kHeads, kThreads / x);
  return dim3(x, y, fit(positions, kThreads / (x * y) < 64 ? kThreads / (x * y) : 64));  // 64: CUDA's limit
}

}  // namespace

void rotary(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& shape, int device, void* stream) {
  with_types("rotary", shape.dtype, "table_dtype", shape.table_dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    using W = typename decltype(types)::Parameter;
    const RotaryShape& s = shape;
    if (s.elements() == 0) return;
    constexpr int kWide = kVectorBytes / sizeof(T);
    const int64_t apart = s.dim | s.half | s.batch_stride | s.head_stride | s.row_stride;
    const bool wide = apart % kWide == 0 && aligned_for_vectors(x, cos, sin, out);
    auto* kernel = wide ? rotary_kernel<T, W, kWide, false> : rotary_kernel<T, W, 1, false>;
    if (s.interleaved) kernel = wide ? rotary_kernel<T, W, kWide, true> : rotary_kernel<T, W, 1, true>;
    const DeviceGuard guard(device);
    const int64_t all_rows = s.batch * s.rows;
    const dim3 block = block_shape(s.half / (wide ? kWide : 1), s.heads, all_rows);
    launch({unsigned((all_rows + block.z - 1) / block.z), block, 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(x), static_cast<const W*>(cos), static_cast<const W*>(sin), offsets,
           static_cast<T*>(out), all_rows, s.rows, s.heads, s.dim, s.half, s.positions, s.batch_stride,
           s.head_stride, s.row_stride, s.offset, s.inverse ? -1.0f : 1.0f);
  });
}

}  // namespace lspm::cuda
