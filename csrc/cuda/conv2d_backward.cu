// The gradients of two-dimensional convolution.
//
// Of x: for a stride of s, pixels of x whose place is alike modulo s share the taps that reach them. Their
// gradients are a correlation of stride 1 over dz with these taps, so that the forward's kernel serves, s^2
// times, each with its part of the weight; nothing is added up in memory.
//
// Of weight: a block owns 64 filters and 128 terms (taps and channels) of a group and a run of pixels, 32 at
// a time. Both sides lie in shared memory as in memory, a pixel's channels side by side, and ldmatrix
// transposes. A second kernel adds the runs up in order, so that a result has the same bits every time.
// Bytes moved: dz and x once for each block that reads them, mostly from L2, and 8 a run for each element.
#include <numeric>

#include "conv2d_tiles.cuh"

namespace lspm::cuda {
namespace {

constexpr int kFilters = 64, kTerms = 128;  // of a block
constexpr int kFilterChunks = kFilters / kChunk, kTermChunks = kTerms / kChunk;
constexpr int kStage = kConvDepth * (kFilters + kTerms);

template <class T, bool kAligned>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv2d_backward_weight_kernel(const __grid_constant__ Correlation c, const T* dz, const T* x,
                                  float* partial, int64_t points_of_run) {
  constexpr int kRows = kFilters / 2 / 16, kTiles = kTerms / 2 / 8;
  constexpr int kLeftApart = kConvThreads / kFilterChunks, kRightApart = kConvThreads / kTermChunks;
  DYNAMIC_SHARED(memory);
  T* const tiles = reinterpret_cast<T*>(memory);
  const int terms = c.terms();
  const unsigned parts = (terms + kTerms - 1) / kTerms,
                 of_group = (c.filters + kFilters - 1) / kFilters * parts;
  const int group = blockIdx.x / of_group, first_term = blockIdx.x % parts * kTerms;
  const int first_filter = blockIdx.x % of_group / parts * kFilters;
  const int64_t first = blockIdx.y * points_of_run;
  const int count = int(max(int64_t(0), min(points_of_run, c.points - first)));

  const int left_row = threadIdx.x / kFilterChunks, left_chunk = threadIdx.x % kFilterChunks;
  const int filter = first_filter + left_chunk * kChunk;
  const int64_t left_stride = int64_t(c.groups) * c.filters;
  const T* left_from = dz + (first + left_row) * left_stride + group * c.filters + filter;
  const int right_row = threadIdx.x / kTermChunks, right_chunk = threadIdx.x % kTermChunks;
  const T* const right_from = x + group * c.depth;
  const Counter points = c.of_points();
  Digits point = points.of(first + right_row);
  const Digits point_step = points.of(unsigned(kRightApart));
  const Digits term = c.of_terms().of(unsigned(first_term + right_chunk * kChunk));
  int at = 0;
  const auto load_stage = [&](int stage) {
    T* const left = tiles + stage * kStage;
    T* const right = left + kConvDepth * kFilters;
#pragma unroll(kAligned ? kConvDepth / kLeftApart : 1)
    for (int i = 0; i < kConvDepth; i += kLeftApart, left_from += kLeftApart * left_stride)
      copy_chunk<kAligned>(left + tile_place<kFilterChunks>(left_row + i, left_chunk), left_from,
                           at + left_row + i < count ? c.filters - filter : 0);
#pragma unroll(kAligned ? kConvDepth / kRightApart : 1)  // registers are scarce where elements are copied
    for (int i = 0; i < kConvDepth; i += kRightApart, points.add(point, point_step))
      copy_terms<kAligned>(right + tile_place<kTermChunks>(right_row + i, right_chunk), right_from, c,
                           c.pixel(point, at + right_row + i < count), term);
    at += kConvDepth;
  };

  const int warp = threadIdx.x / kWarp, warp_row = warp / 2 * 16 * kRows, warp_column = warp % 2 * 8 * kTiles;
  float sums[kRows][kTiles][4] = {};
  pipeline((count + kConvDepth - 1) / kConvDepth, load_stage, [&](int stage) {
    const T* const left = tiles + stage * kStage;
    const T* const right = left + kConvDepth * kFilters;
    multiply_tiles<T>(
        sums,
        [&](int r, int k, uint32_t (&a)[4]) {
          load_matrices<true, kFilterChunks>(a, left, 16 * k, (warp_row + 16 * r) / kChunk, false);
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          load_matrices<true, kTermChunks>(b, right, 16 * k, warp_column / kChunk + n, true);
        });
  });

  float* const run = partial + (int64_t(blockIdx.y) * c.groups + group) * c.filters * terms;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_filter + warp_row + 16 * r + 8 * (i / 2) + lane_row();
        const int column = first_term + warp_column + 8 * n + lane_column() + i % 2;
        if (row < c.filters && column < terms) run[int64_t(row) * terms + column] = sums[r][n][i];
      }
}

// One thread per element of dweight.
template <class T>
__global__ void conv2d_backward_weight_sum_kernel(const __grid_constant__ Correlation c,
                                                  const float* __restrict__ partial, int64_t partials,
                                                  T* dweight, const __grid_constant__ WeightView view) {
  const int terms = c.terms();
  const int64_t elements = int64_t(c.groups) * c.filters * terms;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, filter = index / terms;
  if (index >= elements) return;
  const Digits term = c.of_terms().of(unsigned(index - filter * terms));
  float total = 0.0f;
#pragma unroll 8
  for (int64_t p = 0; p < partials; ++p) total += partial[p * elements + index];
  dweight[filter * view.filter + term.first * view.row + term.second * view.column +
          term.third * view.channel] = from_float<T>(total);
}

// Along one axis, the taps that reach the pixels of x at `phase` modulo the stride.
struct Taps {
  int first, step, count;  // of the kernel's
  int place, apart;        // in dz: that of the first for the first pixel, and from tap to tap

  Taps(int64_t phase, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : first(0), step(int(stride / std::gcd(stride, dilation))), apart(-int(dilation * step / stride)) {
    while (first < kernel && (phase + padding - first * dilation) % stride != 0 && first < step) ++first;
    const bool some = first < kernel && first < step;
    count = some ? int((kernel - first + step - 1) / step) : 0;
    place = some ? int((phase + padding - first * dilation) / stride) : 0;
  }
};

void backward_data(const void* dz, const void* weight, void* dx, void* packed, const Conv2dShape& s,
                   cudaStream_t stream) {
  const int64_t bytes = sizeof(bf16), channels = s.channels;
  const auto& strides = s.weight_strides;
  for (int64_t i = 0; i < min(s.stride_h, s.height); ++i)
    for (int64_t j = 0; j < min(s.stride_w, s.width); ++j) {
      const Taps down(i, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
      const Taps right(j, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
      const int64_t rows = (s.height - i + s.stride_h - 1) / s.stride_h;
      const int64_t columns = (s.width - j + s.stride_w - 1) / s.stride_w;
      const Correlation c = {int(s.out_height),
                             int(s.out_width),
                             int(s.filters),
                             int(rows),
                             int(columns),
                             1,
                             1,
                             down.place,
                             right.place,
                             right.count ? down.count : 0,
                             max(right.count, 1),
                             down.apart,
                             right.apart,
                             int(s.groups),
                             int(s.group_filters()),
                             int(s.group_channels()),
                             s.batch * rows * columns};
      const int64_t from = down.first * strides[2] + right.first * strides[3];
      conv2d_correlate(c, dz,
                       {static_cast<const char*>(weight) + from * bytes, strides[1], strides[0],
                        down.step * strides[2], right.step * strides[3]},
                       s.group_filters() * strides[0],
                       {{nullptr, nullptr, nullptr, Activation::none},
                        static_cast<char*>(dx) + (i * s.width + j) * channels * bytes,
                        s.height * s.width * channels,
                        s.stride_h * s.width * channels,
                        s.stride_w * channels},
                       packed, s.dtype, stream);
    }
}

template <class T>
void backward_weight(const T* dz, const T* x, T* dweight, float* partial, int64_t partials,
                     const Conv2dShape& s, cudaStream_t stream) {
  const Correlation c = conv2d_sums(s);
  const int64_t of_run = ((c.points + partials - 1) / partials + kConvDepth - 1) / kConvDepth * kConvDepth;
  const int64_t blocks =
      int64_t((c.filters + kFilters - 1) / kFilters) * ((c.terms() + kTerms - 1) / kTerms) * c.groups;
  const bool aligned = c.depth % kChunk == 0 && c.filters % kChunk == 0 && aligned_for_vectors(dz, x);
  launch({dim3(unsigned(blocks), unsigned(partials)), kConvThreads, kConvStages * kStage * sizeof(T), stream},
         aligned ? conv2d_backward_weight_kernel<T, true> : conv2d_backward_weight_kernel<T, false>, c, dz, x,
         partial, of_run);
  constexpr int kThreads = 256;
  const int64_t elements = s.filters * c.terms();
  launch({unsigned((elements + kThreads - 1) / kThreads), kThreads, 0, stream},
         conv2d_backward_weight_sum_kernel<T>, c, partial, partials, dweight,
         WeightView{nullptr, s.weight_strides[0], s.weight_strides[1], s.weight_strides[2],
                    s.weight_strides[3]});
}

}  // namespace

void conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight, void* packed,
                     float* partial, int64_t partials, const Conv2dShape& s, int device, void* stream) {
  with_type("conv2d_backward", s.dtype, [&](auto type) {
    using T = decltype(type);
    const DeviceGuard guard(device);
    if (dx) backward_data(dz, weight, dx, packed, s, cudaStream_t(stream));
    if (dweight)
      backward_weight(static_cast<const T*>(dz), static_cast<const T*>(x), static_cast<T*>(dweight), partial,
                      partials, s, cudaStream_t(stream));
  });
}

}  // namespace lspm::cuda
