// Two-dimensional convolution by implicit GEMM on tensor cores, with its epilogue.
//
// A block owns 128 pixels of y and 64 or 128 filters of a group, a warp a quarter of them in registers. Terms
// of the sums, taps and channels, go by in tiles of 32: a thread copies the same chunk of several pixels, and
// zeros where a tap lies in the padding, so nothing is unfolded in memory. Four tiles are in shared memory,
// where at last the sums lie as floats, so that the epilogue moves residual and y in whole vectors.
// Bytes moved: x and weight once for each block that reads them, mostly from L2; residual and y once.
// The gradient of x is the same sum over dz (conv2d_backward.cu).
#include "conv2d_tiles.cuh"

namespace lspm::cuda {
namespace {

constexpr int kPoints = 128;  // of a block
constexpr int kChunks = kConvDepth / kChunk;

template <int kFilters>
struct CorrelationTile {
  static constexpr int kElements = (kPoints + kFilters) * kConvDepth;  // of a stage
  static constexpr int kPitch = kFilters + 8;  // of sums: four rows of a fragment in different banks
  static constexpr int kCopies = kConvStages * kElements * int(sizeof(bf16));
  static constexpr int kSums = kPoints * kPitch * int(sizeof(float));
  static constexpr int kBytes = kCopies > kSums ? kCopies : kSums;
};

struct CorrelationCall {
  Correlation c;
  CorrelationOutput out;
  const void *input, *weight;  // the weight has (group, filter, term), `pitch` terms to a filter
  int pitch;
  bool vectors;  // residual and output are aligned to vectors
};

__device__ __forceinline__ float activated(float z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0.0f ? 0.0f : z;
    case Activation::relu6:
      return z < 0.0f ? 0.0f : z > 6.0f ? 6.0f : z;
    case Activation::silu:
      return z / (1.0f + __expf(-z));
    case Activation::gelu:
      return 0.5f * z * (1.0f + erff(z * 0.707106781f));
    default:
      return z;
  }
}

// The output's elements from `at` on, `count` of them, of the filters from `filter` on.
template <class T>
__device__ __forceinline__ void write_output(const CorrelationCall& call, const float* sums, int filter,
                                             int64_t at, int count) {
  const Conv2dEpilogue& epilogue = call.out.epilogue;
  T* const to = static_cast<T*>(call.out.data) + at;
  const T* const residual = epilogue.residual ? static_cast<const T*>(epilogue.residual) + at : nullptr;
  const Vec<float, kChunk> z = load<kChunk>(sums);
  Vec<T, kChunk> v = {};
  if (residual && call.vectors) v = load<kChunk>(residual);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    if (e >= count) break;
    float y = z.at[e];
    if (epilogue.scale) y *= epilogue.scale[filter + e];
    if (epilogue.shift) y += epilogue.shift[filter + e];
    if (residual) y += to_float(call.vectors ? v.at[e] : residual[e]);
    v.at[e] = from_float<T>(activated(y, epilogue.activation));
    if (!call.vectors) to[e] = v.at[e];
  }
  if (call.vectors) store(to, v);
}

template <class T, int kFilters, bool kAligned>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv2d_correlate_kernel(const __grid_constant__ CorrelationCall call) {
  using Tile = CorrelationTile<kFilters>;
  constexpr int kRows = kPoints / 2 / 16, kTiles = kFilters / 2 / 8, kApart = kConvThreads / kChunks;
  DYNAMIC_SHARED(memory);
  T* const tiles = reinterpret_cast<T*>(memory);
  const Correlation& c = call.c;
  // Blocks that read the same pixels run side by side.
  const unsigned parts = (c.filters + kFilters - 1) / kFilters, of_points = parts * c.groups;
  const int group = blockIdx.x % of_points / parts, first_filter = blockIdx.x % parts * kFilters;
  const int64_t first = int64_t(blockIdx.x / of_points) * kPoints;
  const int own = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;

  constexpr int kHeld = kAligned ? kPoints / kApart : 1;  // where elements are copied, registers are scarce
  const Counter points = c.of_points(), terms = c.of_terms();
  Digits point = points.of(first + own);
  const Digits point_step = points.of(unsigned(kApart));
  const auto go_on = [&](int i) {
    const Pixel pixel = c.pixel(point, first + own + i * kApart < c.points);
    points.add(point, point_step);
    return pixel;
  };
  Pixel pixels[kHeld];
  for (int i = 0; kAligned && i < kHeld; ++i) pixels[i] = go_on(i);
  int at = chunk * kChunk;  // the term that this thread copies next
  Digits term = terms.of(unsigned(at));
  const Digits term_step = terms.of(unsigned(kConvDepth));
  const T* const input = static_cast<const T*>(call.input) + group * c.depth;
  const T* const weight =
      static_cast<const T*>(call.weight) + (int64_t(group) * c.filters + first_filter + own) * call.pitch;
  const auto load_stage = [&](int stage) {
    T* const left = tiles + stage * Tile::kElements;
    T* const right = left + kPoints * kConvDepth;
    const Digits start = point;
#pragma unroll(kHeld)
    for (int i = 0; i < kPoints / kApart; ++i)
      copy_terms<kAligned>(left + tile_place<kChunks>(own + i * kApart, chunk), input, c,
                           kAligned ? pixels[i % kHeld] : go_on(i), term);
    point = start;
#pragma unroll
    for (int i = 0; i < kFilters / kApart; ++i)
      ptx::cp_async16(right + tile_place<kChunks>(own + i * kApart, chunk),
                      weight + int64_t(i * kApart) * call.pitch + at,
                      first_filter + own + i * kApart < c.filters && at < call.pitch);
    at += kConvDepth;
    terms.add(term, term_step);
  };

  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / 2 * 16 * kRows, warp_column = warp % 2 * 8 * kTiles;
  float sums[kRows][kTiles][4] = {};
  pipeline((call.pitch + kConvDepth - 1) / kConvDepth, load_stage, [&](int stage) {
    const T* const left = tiles + stage * Tile::kElements;
    const T* const right = left + kPoints * kConvDepth;
    multiply_tiles<T>(
        sums,
        [&](int r, int k, uint32_t (&a)[4]) {
          load_matrices<false, kChunks>(a, left, warp_row + 16 * r, 2 * k, true);
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          load_matrices<false, kChunks>(b, right, warp_column + 8 * n, 2 * k, false);
        });
  });

  __syncthreads();  // every warp is done with the tiles
  float* const results = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * r + 8 * h + lane_row(), column = warp_column + 8 * n + lane_column();
        *reinterpret_cast<float2*>(results + row * Tile::kPitch + column) =
            float2{sums[r][n][2 * h], sums[r][n][2 * h + 1]};
      }
  __syncthreads();
  constexpr int kVectors = kFilters / kChunk, kDown = kConvThreads / kVectors;
  const int column = threadIdx.x % kVectors * kChunk, filter = first_filter + column;
  if (filter >= c.filters) return;
  int row = threadIdx.x / kVectors;
  point = points.of(first + row);
  const Digits down = points.of(unsigned(kDown));
#pragma unroll 1
  for (; row < kPoints && first + row < c.points; row += kDown, points.add(point, down))
    write_output<T>(call, results + row * Tile::kPitch + column, group * c.filters + filter,
                    point.first * call.out.image + point.second * call.out.row +
                        point.third * call.out.pixel + group * c.filters + filter,
                    min(kChunk, c.filters - filter));
}

// One thread per element of the weight as tiles are copied from it.
template <class T>
__global__ void conv2d_pack_kernel(const __grid_constant__ Correlation c, const T* weight,
                                   const __grid_constant__ WeightView view, int64_t group_stride, int pitch,
                                   T* packed) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, filter = index / pitch;
  if (filter >= int64_t(c.groups) * c.filters) return;
  const int at = int(index - filter * pitch);
  const Digits term = c.of_terms().of(unsigned(at));
  const int64_t from = filter / c.filters * group_stride + filter % c.filters * view.filter +
                       term.first * view.row + term.second * view.column + term.third * view.channel;
  packed[index] = at < c.terms() ? weight[from] : from_float<T>(0.0f);
}

// Whether the weight lies as tiles are copied from it.
bool is_packed(const Correlation& c, const WeightView& weight, int64_t group_stride, int pitch) {
  const auto as = [](int count, int64_t stride, int64_t wanted) { return count == 1 || stride == wanted; };
  return pitch == c.terms() && aligned_for_vectors(weight.data) && as(c.depth, weight.channel, 1) &&
         as(c.tap_columns, weight.column, c.depth) && as(c.tap_rows, weight.row, c.tap_columns * c.depth) &&
         as(c.filters, weight.filter, pitch) && as(c.groups, group_stride, int64_t(c.filters) * pitch);
}

template <class T, int kFilters>
void launch_correlation(const CorrelationCall& call, bool aligned, cudaStream_t stream) {
  const Correlation& c = call.c;
  const int64_t parts = (c.filters + kFilters - 1) / kFilters * int64_t(c.groups);
  const int64_t blocks = (c.points + kPoints - 1) / kPoints * parts;
  auto* kernel =
      aligned ? conv2d_correlate_kernel<T, kFilters, true> : conv2d_correlate_kernel<T, kFilters, false>;
  launch({unsigned(blocks), kConvThreads, CorrelationTile<kFilters>::kBytes, stream}, kernel, call);
}

}  // namespace

void conv2d_correlate(const Correlation& c, const void* input, const WeightView& weight, int64_t group_stride,
                      const CorrelationOutput& out, void* packed, DType dtype, cudaStream_t stream) {
  if (c.points == 0) return;
  with_type("conv2d_forward", dtype, [&](auto type) {
    using T = decltype(type);
    const int pitch = int(Conv2dShape::in_vectors(c.terms()));
    const int64_t elements = int64_t(c.groups) * c.filters * pitch;
    const bool lies_so = is_packed(c, weight, group_stride, pitch);
    if (elements > 0 && !lies_so) {
      constexpr int kThreads = 256;
      launch({unsigned((elements + kThreads - 1) / kThreads), kThreads, 0, stream}, conv2d_pack_kernel<T>, c,
             static_cast<const T*>(weight.data), weight, group_stride, pitch, static_cast<T*>(packed));
    }
    const CorrelationCall call = {
        c,     out,
        input, lies_so ? weight.data : packed,
        pitch, c.filters % kChunk == 0 && aligned_for_vectors(out.data, out.epilogue.residual)};
    const bool aligned = c.depth % kChunk == 0 && aligned_for_vectors(input);
    c.filters > 64 ? launch_correlation<T, 128>(call, aligned, stream)
                   : launch_correlation<T, 64>(call, aligned, stream);
  });
}

void conv2d_forward(const void* x, const void* weight, const Conv2dEpilogue& epilogue, void* y, void* packed,
                    const Conv2dShape& s, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto& strides = s.weight_strides;
  conv2d_correlate(conv2d_sums(s), x, {weight, strides[0], strides[1], strides[2], strides[3]},
                   s.group_filters() * strides[0],
                   {epilogue, y, s.out_height * s.out_width * s.filters, s.out_width * s.filters, s.filters},
                   packed, s.dtype, cudaStream_t(stream));
}

}  // namespace lspm::cuda
