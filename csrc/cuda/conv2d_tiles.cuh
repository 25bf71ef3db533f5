// What the CUDA kernels of conv2d share: which pixels a sum reads, and how tiles of them are copied and
// multiplied.
//
// A row of a tile in shared memory has kChunks chunks of 16 bytes, permuted among 8 rows so that neither
// copies nor ldmatrix meet a bank twice. A warp multiplies 16 kRows rows by 8 kTiles columns:
// d[r][n][2 h + e] is row 16 r + 8 h + lane_row(), column 8 n + lane_column() + e.
#pragma once
#include "../conv2d.h"
#include "ptx.cuh"

namespace lspm::cuda {

constexpr int kConvThreads = 128;  // 2 x 2 warps
constexpr int kConvStages = 4;     // tiles in shared memory, of which all but one are on their way
constexpr int kConvDepth = 32;     // terms of a sum in a tile
constexpr int kNowhere = -(1 << 30);

// An index in digits, so that going on needs no division: image, row and column of a point, or row, column
// and channel of a term.
struct Digits {
  int first, second, third;
};
struct Counter {
  int seconds, thirds;

  template <class Index>
  __device__ __forceinline__ Digits of(Index index) const {
    const Index rest = index / Index(thirds);
    return {int(rest / Index(seconds)), int(rest % Index(seconds)), int(index % Index(thirds))};
  }
  __device__ __forceinline__ void add(Digits& to, const Digits& step) const {
    to.third += step.third;
    const bool over = to.third >= thirds;
    to.third -= over ? thirds : 0;
    to.second += step.second + over;
    const bool above = to.second >= seconds;
    to.second -= above ? seconds : 0;
    to.first += step.first + above;
  }
};

// Where a point's first tap lies: a pixel of the input, or of the padding around it.
struct Pixel {
  int row, column;
  int64_t offset;
};

// For each point of a grid a sum over taps, which are pixels of the input in a fixed place from it, and over
// a group's channels of each.
struct Correlation {
  int height, width, channels;  // of the input
  int rows, columns;            // of the grid
  int stride_h, stride_w;       // pixels of the input from point to point
  int top, left;                // the first tap of point (0, 0)
  int tap_rows, tap_columns;
  int step_h, step_w;          // pixels of the input from tap to tap
  int groups, depth, filters;  // a group's channels in and out
  int64_t points;              // of all images

  __host__ __device__ int terms() const { return tap_rows * tap_columns * depth; }
  __device__ Counter of_points() const { return {rows, columns}; }
  __device__ Counter of_terms() const { return {tap_columns, depth}; }

  __device__ __forceinline__ Pixel pixel(const Digits& point, bool exists) const {
    const int row = point.second * stride_h + top, column = point.third * stride_w + left;
    const int64_t offset = ((int64_t(point.first) * height + row) * width + column) * channels;
    return {exists ? row : kNowhere, column, offset};
  }
  __device__ __forceinline__ int64_t offset(const Digits& term) const {
    return int64_t(term.first * step_h * width + term.second * step_w) * channels + term.third;
  }
  __device__ __forceinline__ bool sees(const Pixel& pixel, const Digits& term) const {
    return unsigned(pixel.row + term.first * step_h) < unsigned(height) &&
           unsigned(pixel.column + term.second * step_w) < unsigned(width) && term.first < tap_rows;
  }
};

// The forward's sums.
inline Correlation conv2d_sums(const Conv2dShape& s) {
  return {int(s.height),
          int(s.width),
          int(s.channels),
          int(s.out_height),
          int(s.out_width),
          int(s.stride_h),
          int(s.stride_w),
          -int(s.padding_h),
          -int(s.padding_w),
          int(s.kernel_h),
          int(s.kernel_w),
          int(s.dilation_h),
          int(s.dilation_w),
          int(s.groups),
          int(s.group_channels()),
          int(s.group_filters()),
          s.batch * s.out_height * s.out_width};
}

// Where the sums go, and by what epilogue.
struct CorrelationOutput {
  Conv2dEpilogue epilogue;
  void* data;
  int64_t image, row, pixel;  // elements from one to the next
};
// The weight, in elements from one to the next.
struct WeightView {
  const void* data;
  int64_t filter, channel, row, column;
};
// Sums of `weight` times `input`; packed is scratch of c.groups * c.filters * in_vectors(c.terms()) elements.
void conv2d_correlate(const Correlation& c, const void* input, const WeightView& weight, int64_t group_stride,
                      const CorrelationOutput& out, void* packed, DType dtype, cudaStream_t stream);

template <int kChunks>
__device__ __forceinline__ int tile_place(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks % 8 == 0, "8 rows of a chunk lie in 8 groups of banks");
  return (row * kChunks + (chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8))) * kChunk;
}

// Starts to copy a chunk, of which `count` elements exist; zeros behind them. kAligned: to 16 bytes, and none
// or all exist; else the copy is complete at the next barrier.
template <bool kAligned, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int count) {
  if constexpr (kAligned) {
    ptx::cp_async16(to, from, count > 0);  // reads nothing where there is none
  } else {
    Vec<T, kChunk> v;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v.at[e] = e < count ? from[e] : from_float<T>(0.0f);
    store(to, v);
  }
}

// The same for the terms from `term` on of a point. kAligned: a chunk lies within a tap.
template <bool kAligned, class T>
__device__ __forceinline__ void copy_terms(T* to, const T* input, const Correlation& c, const Pixel& pixel,
                                           Digits term) {
  if constexpr (kAligned) {
    ptx::cp_async16(to, input + pixel.offset + c.offset(term), c.sees(pixel, term));
  } else {
    Vec<T, kChunk> v;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      v.at[e] = c.sees(pixel, term) ? input[pixel.offset + c.offset(term)] : from_float<T>(0.0f);
      c.of_terms().add(term, {0, 0, 1});
    }
    store(to, v);
  }
}

// Four matrices of 8 x 8 from `row` and `chunk` on: the second and third lie below the first and beside it,
// or the reverse.
template <bool kTranspose, int kChunks, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const T* tile, int row, int chunk,
                                              bool below_first) {
  const int lane = threadIdx.x % kWarp, second = lane / 8 % 2, third = lane / 16;
  row += (below_first ? second : third) * 8 + lane % 8;
  ptx::ldmatrix_x4<kTranspose>(r, tile + tile_place<kChunks>(row, chunk + (below_first ? third : second)));
}

// d += a b over kConvDepth terms: left(r, k, a) gives rows 16 r and on, right(n, k, b) two columns of tiles
// from n on, both of the terms from 16 k on.
template <class T, int kRows, int kTiles, class Left, class Right>
__device__ __forceinline__ void multiply_tiles(float (&d)[kRows][kTiles][4], Left left, Right right) {
#pragma unroll
  for (int k = 0; k < kConvDepth / 16; ++k) {
    uint32_t a[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) left(r, k, a[r]);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      right(n, k, b);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        ptx::mma_16816<T>(d[r][n], a[r], low);
        ptx::mma_16816<T>(d[r][n + 1], a[r], high);
      }
    }
  }
}

// Calls multiply(stage) for `steps` tiles in order, each once load(stage) has come; load is called in order
// too, kConvStages - 1 tiles ahead.
template <class Load, class Multiply>
__device__ __forceinline__ void pipeline(int steps, Load load, Multiply multiply) {
  for (int ahead = 0; ahead < kConvStages - 1; ++ahead) {
    if (ahead < steps) load(ahead);
    ptx::cp_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kConvStages - 2>();
    __syncthreads();  // the tile has come, and every warp is done with the one before
    const int ahead = step + kConvStages - 1;
    if (ahead < steps) load(ahead % kConvStages);
    ptx::cp_async_commit();  // empty at the end, so that the wait above counts right
    multiply(step % kConvStages);
  }
}

}  // namespace lspm::cuda
