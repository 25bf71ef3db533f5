// Batch norm over rows with a residual addition and an activation (Ioffe and Szegedy 2015).
//
// A thread owns 16 bytes of the channels of a row, and the same channels of the rows blockDim.y apart, so
// what is known of them stays in registers. A block of a reduction owns one run of rows and puts its threads'
// sums together through 8 KiB of shared memory, in order; a second kernel does the same with the runs, in
// double. Statistics are sums of deviations from the mean of a run's first rows: a large mean cancels
// nothing. Bytes per element of s bytes: statistics s, forward 2 s, sums 2 s, backward 3 s; a residual adds s
// to the last three and its gradient s to the sums.
#include "../batch_norm_act.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

using Shape = BatchNormActShape;
constexpr int kThreads = 256;
constexpr int kRowsOfThread = 8;                      // in kernels that reduce nothing
constexpr int kMergedChannels = 32, kMergedRuns = 8;  // of a block that puts runs together

template <int kWidth>
using Floats = Vec<float, kWidth>;

// The channels of a thread, and what is known of them.
template <int kWidth>
struct Known {
  Floats<kWidth> mean, scale, shift, rstd;

  __device__ __forceinline__ Known(const BatchNormActChannels& from, int64_t col, float eps) {
    mean = load<kWidth>(from.mean + col);
    const Floats<kWidth> variance = load<kWidth>(from.variance + col);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      rstd.at[e] = scale.at[e] = 1.0f / sqrtf(variance.at[e] + eps);
      shift.at[e] = 0.0f;
    }
    if (from.weight) {
      const Floats<kWidth> weight = load<kWidth>(from.weight + col);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) scale.at[e] *= weight.at[e];
    }
    if (from.bias) shift = load<kWidth>(from.bias + col);
  }
};

template <int kWidth, class T>
__device__ __forceinline__ Floats<kWidth> load_floats(const T* from) {
  const Vec<T, kWidth> loaded = load<kWidth>(from);
  Floats<kWidth> out;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out.at[e] = to_float(loaded.at[e]);
  return out;
}
template <int kWidth, class T>
__device__ __forceinline__ void store_floats(T* to, const Floats<kWidth>& from) {
  Vec<T, kWidth> rounded;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) rounded.at[e] = from_float<T>(from.at[e]);
  store(to, rounded);
}

// The activation is the same for all threads, so a branch costs little beside the memory.
__device__ __forceinline__ float activated(float z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0.0f ? 0.0f : z;
    case Activation::relu6:
      return z < 0.0f ? 0.0f : z > 6.0f ? 6.0f : z;
    case Activation::silu:
      return z * (1.0f / (1.0f + __expf(-z)));
    case Activation::gelu:
      return 0.5f * z * (1.0f + erff(z * 0.707106781f));
    default:
      return z;
  }
}
// g times the activation's slope at z.
__device__ __forceinline__ float through(float g, float z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z <= 0.0f ? 0.0f : g;
    case Activation::relu6:
      return z <= 0.0f || z >= 6.0f ? 0.0f : g;
    case Activation::silu: {
      const float sigmoid = 1.0f / (1.0f + __expf(-z));
      return g * sigmoid * (1.0f + z * (1.0f - sigmoid));
    }
    case Activation::gelu:
      return g * (0.5f * (1.0f + erff(z * 0.707106781f)) + z * 0.398942280f * __expf(z * z * -0.5f));
    default:
      return g;
  }
}

// Turns each thread's values into their sums over threadIdx.y, added as eight sums whose sum is taken by
// twos: in one chain of up to 256 the last additions would round for all. Every thread calls.
template <class S, int kWidth>
__device__ __forceinline__ void column_sums(S (&values)[kWidth]) {
  constexpr int kSums = 8;
  SHARED(S, tile, [kThreads * kWidth]);
  const int threads = blockDim.x * blockDim.y;
  __syncthreads();  // the previous call has read its values
#pragma unroll
  for (int e = 0; e < kWidth; ++e) tile[e * threads + threadIdx.y * blockDim.x + threadIdx.x] = values[e];
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    S sums[kSums] = {};
    for (int first = 0; first < blockDim.y; first += kSums) {
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        if (first + s < blockDim.y) sums[s] += tile[e * threads + (first + s) * blockDim.x + threadIdx.x];
    }
#pragma unroll
    for (int half = kSums / 2; half > 0; half /= 2) {
#pragma unroll
      for (int s = 0; s < half; ++s) sums[s] += sums[s + half];
    }
    values[e] = sums[0];
  }
}

// The rows of a block's run that a thread of a channel within the bounds goes over: none for the others,
// which still take part in the sums.
struct Run {
  int64_t begin, end;
  __device__ Run(int64_t rows, int64_t rows_per_run) {
    begin = int64_t(blockIdx.x) * rows_per_run < rows ? int64_t(blockIdx.x) * rows_per_run : rows;
    end = begin + rows_per_run < rows ? begin + rows_per_run : rows;
  }
};

template <int kWidth>
__device__ __forceinline__ int64_t own_channel() {
  return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_statistics_kernel(const T* __restrict__ x, float* partial, int64_t rows, int64_t channels,
                                     int64_t rows_per_run) {
  const Run run(rows, rows_per_run);
  const int64_t col = own_channel<kWidth>(), end = col < channels ? run.end : run.begin;
  const int64_t count = run.end - run.begin;
  float shift[kWidth] = {}, total[kWidth] = {}, squares[kWidth] = {};
  if (run.begin + threadIdx.y < end) {
    const Floats<kWidth> first = load_floats<kWidth>(x + (run.begin + threadIdx.y) * channels + col);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) shift[e] = first.at[e];
  }
  column_sums(shift);
  const float seen = float(count < blockDim.y ? (count > 0 ? count : 1) : blockDim.y);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) shift[e] /= seen;
#pragma unroll 4
  for (int64_t row = run.begin + threadIdx.y; row < end; row += blockDim.y) {
    const Floats<kWidth> value = load_floats<kWidth>(x + row * channels + col);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float deviation = value.at[e] - shift[e];
      total[e] += deviation;
      squares[e] += deviation * deviation;
    }
  }
  column_sums(total);
  column_sums(squares);
  if (threadIdx.y > 0 || col >= channels) return;
  const float share = count > 0 ? 1.0f / count : 0.0f;
  Floats<kWidth> counts, means, deviations;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    const double sum = total[e], rest = squares[e] - sum * sum * share;  // a square that overflows later
    counts.at[e] = float(count);
    means.at[e] = shift[e] + total[e] * share;
    deviations.at[e] = rest < 0.0 ? 0.0f : float(rest);
  }
  float* const out = partial + int64_t(blockIdx.x) * 3 * channels + col;
  store(out, counts);
  store(out + channels, means);
  store(out + 2 * channels, deviations);
}

// A thread owns a channel and every kMergedRuns-th run.
__global__ void __launch_bounds__(kMergedChannels* kMergedRuns)
    batch_norm_act_merge_kernel(const float* __restrict__ partial, float* mean, float* variance, int64_t runs,
                                int64_t channels) {
  const int64_t col = own_channel<1>(), own_runs = col < channels ? runs : 0;
  double sums[2] = {}, squares[1] = {};  // of counts and of means times counts; of squared deviations
  for (int64_t p = threadIdx.y; p < own_runs; p += kMergedRuns) {
    const float* const run = partial + 3 * p * channels + col;
    sums[0] += run[0];
    sums[1] += double(run[0]) * run[channels];
  }
  column_sums(sums);
  const double count = sums[0] > 0 ? sums[0] : 1.0, center = sums[1] / count;
  for (int64_t p = threadIdx.y; p < own_runs; p += kMergedRuns) {
    const float* const run = partial + 3 * p * channels + col;
    const double between = run[channels] - center;
    squares[0] += run[2 * channels] + run[0] * between * between;
  }
  column_sums(squares);
  if (threadIdx.y > 0 || col >= channels) return;
  mean[col] = float(center);
  variance[col] = float(squares[0] / count);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_forward_kernel(const T* __restrict__ x, const T* __restrict__ residual,
                                  BatchNormActChannels channels_of, T* y, int64_t rows, int64_t channels,
                                  Activation activation, float eps) {
  const int64_t col = own_channel<kWidth>();
  if (col >= channels) return;
  const Known<kWidth> known(channels_of, col, eps);
  int64_t row = int64_t(blockIdx.x) * blockDim.y * kRowsOfThread + threadIdx.y;
#pragma unroll 4
  for (int r = 0; r < kRowsOfThread && row < rows; ++r, row += blockDim.y) {
    const int64_t at = row * channels + col;
    Floats<kWidth> z = load_floats<kWidth>(x + at), added{};
    if (residual) added = load_floats<kWidth>(residual + at);
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      z.at[e] = activated((z.at[e] - known.mean.at[e]) * known.scale.at[e] + known.shift.at[e] + added.at[e],
                          activation);
    store_floats(y + at, z);
  }
}

// The gradient before the activation, and x - mean where x is read.
template <class T, int kWidth>
struct Taken {
  Floats<kWidth> gradient, deviation;

  __device__ __forceinline__ Taken(const T* dy, const T* x, const T* beside, int64_t at,
                                   const Known<kWidth>& known, bool reads_x, Activation activation)
      : gradient(load_floats<kWidth>(dy + at)), deviation{} {
    const bool by_output = activation == Activation::relu && beside;
    if (reads_x) {
      deviation = load_floats<kWidth>(x + at);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) deviation.at[e] -= known.mean.at[e];
    }
    if (activation == Activation::none) return;
    Floats<kWidth> other{};
    if (beside) other = load_floats<kWidth>(beside + at);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float own = deviation.at[e] * known.scale.at[e] + known.shift.at[e];
      const float z = by_output ? other.at[e] : own + other.at[e];
      gradient.at[e] = through(gradient.at[e], z, activation);
    }
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                               const T* __restrict__ beside, BatchNormActChannels channels_of, T* dresidual,
                               float* partial, int64_t rows, int64_t channels, int64_t rows_per_run,
                               Activation activation, float eps) {
  const Run run(rows, rows_per_run);
  const int64_t col = own_channel<kWidth>(), end = col < channels ? run.end : run.begin;
  const Known<kWidth> known(channels_of, col < channels ? col : 0, eps);
  float gradients[kWidth] = {}, products[kWidth] = {};
#pragma unroll 2
  for (int64_t row = run.begin + threadIdx.y; row < end; row += blockDim.y) {
    const int64_t at = row * channels + col;
    const Taken<T, kWidth> taken(dy, x, beside, at, known, true, activation);
    if (dresidual) store_floats(dresidual + at, taken.gradient);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      gradients[e] += taken.gradient.at[e];
      products[e] += taken.gradient.at[e] * taken.deviation.at[e];
    }
  }
  column_sums(gradients);
  column_sums(products);
  if (threadIdx.y > 0 || col >= channels) return;
  Floats<kWidth> out[2];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out[0].at[e] = gradients[e], out[1].at[e] = products[e];
  store(partial + int64_t(blockIdx.x) * 2 * channels + col, out[0]);
  store(partial + (int64_t(blockIdx.x) * 2 + 1) * channels + col, out[1]);
}

__global__ void __launch_bounds__(kMergedChannels* kMergedRuns)
    batch_norm_act_sum_runs_kernel(const float* __restrict__ partial, const float* __restrict__ variance,
                                   float* out, int64_t runs, int64_t channels, float eps) {
  const int64_t col = own_channel<1>(), own_runs = col < channels ? runs : 0;
  double sums[2] = {};
  for (int64_t p = threadIdx.y; p < own_runs; p += kMergedRuns) {
    sums[0] += partial[2 * p * channels + col];
    sums[1] += partial[(2 * p + 1) * channels + col];
  }
  column_sums(sums);
  if (threadIdx.y > 0 || col >= channels) return;
  out[col] = float(sums[0]);
  out[channels + col] = float(sums[1] / sqrt(double(variance[col]) + eps));
}

// sums: null where mean and variance are constants.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                                   const T* __restrict__ beside, BatchNormActChannels channels_of,
                                   const float* __restrict__ sums, T* dx, int64_t rows, int64_t channels,
                                   Activation activation, float eps) {
  const int64_t col = own_channel<kWidth>();
  if (col >= channels) return;
  const Known<kWidth> known(channels_of, col, eps);
  Floats<kWidth> gradient{}, projection{};
  if (sums) {
    gradient = load<kWidth>(sums + col);
    projection = load<kWidth>(sums + channels + col);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      gradient.at[e] /= rows;
      projection.at[e] = projection.at[e] / rows * known.rstd.at[e];
    }
  }
  const bool by_output = activation == Activation::relu && beside;
  const bool reads_x = sums || (activation != Activation::none && !by_output);
  int64_t row = int64_t(blockIdx.x) * blockDim.y * kRowsOfThread + threadIdx.y;
#pragma unroll 2
  for (int r = 0; r < kRowsOfThread && row < rows; ++r, row += blockDim.y) {
    const int64_t at = row * channels + col;
    Taken<T, kWidth> taken(dy, x, beside, at, known, reads_x, activation);
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      taken.gradient.at[e] =
          (taken.gradient.at[e] - gradient.at[e] - taken.deviation.at[e] * projection.at[e]) *
          known.scale.at[e];
    store_floats(dx + at, taken.gradient);
  }
}

// As many threads side by side as channels need, up to a warp, and rows for the others.
dim3 block_shape(int64_t channels, int width) {
  unsigned x = 1;
  while (x < kWarp && x * width < channels) x *= 2;
  return dim3(x, kThreads / x);
}
unsigned blocks(int64_t n, int64_t each) { return unsigned((n + each - 1) / each); }
dim3 merge_grid(int64_t channels) { return dim3(1, blocks(channels, kMergedChannels)); }
const dim3 kMergeBlock(kMergedChannels, kMergedRuns);

// Calls body(Types<T, float>(), wide) with wide, a constant, saying whether 16 bytes are moved at a time.
template <class Body>
void with_width(const char* op, const Shape& s, bool aligned, Body body) {
  with_types(op, s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    if (aligned && s.channels % kWidth == 0)
      body(T(), std::integral_constant<int, kWidth>());
    else
      body(T(), std::integral_constant<int, 1>());
  });
}
bool aligned(const BatchNormActChannels& c) {
  return aligned_for_vectors(c.weight, c.bias, c.mean, c.variance);
}

}  // namespace

void batch_norm_act_statistics(const void* x, float* partial, float* mean, float* variance, const Shape& s,
                               int device, void* stream) {
  if (s.channels == 0) return;
  const DeviceGuard guard(device);
  if (x && s.partials)
    with_width("batch_norm_act_statistics", s, aligned_for_vectors(x, partial), [&](auto t, auto width) {
      using T = decltype(t);
      const dim3 block = block_shape(s.channels, width);
      const dim3 grid(unsigned(s.partials), blocks(s.channels, block.x * width));
      launch({grid, block, 0, cudaStream_t(stream)}, batch_norm_act_statistics_kernel<T, width.value>,
             static_cast<const T*>(x), partial, s.rows, s.channels, s.rows_per_partial());
    });
  launch({merge_grid(s.channels), kMergeBlock, 0, cudaStream_t(stream)}, batch_norm_act_merge_kernel, partial,
         mean, variance, s.partials, s.channels);
}

void batch_norm_act_forward(const void* x, const void* residual, const BatchNormActChannels& channels,
                            void* y, const Shape& s, int device, void* stream) {
  if (s.rows == 0 || s.channels == 0) return;
  const DeviceGuard guard(device);
  const bool wide = aligned(channels) && aligned_for_vectors(x, residual, y);
  with_width("batch_norm_act_forward", s, wide, [&](auto t, auto width) {
    using T = decltype(t);
    const dim3 block = block_shape(s.channels, width);
    const dim3 grid(blocks(s.rows, block.y * kRowsOfThread), blocks(s.channels, block.x * width));
    launch({grid, block, 0, cudaStream_t(stream)}, batch_norm_act_forward_kernel<T, width.value>,
           static_cast<const T*>(x), static_cast<const T*>(residual), channels, static_cast<T*>(y), s.rows,
           s.channels, s.activation, s.eps);
  });
}

void batch_norm_act_sums(const BatchNormActGradient& taken, const BatchNormActChannels& channels,
                         void* dresidual, float* partial, float* sums, const Shape& s, int device,
                         void* stream) {
  if (s.channels == 0) return;
  const DeviceGuard guard(device);
  const bool wide =
      aligned(channels) && aligned_for_vectors(taken.dy, taken.x, taken.beside, dresidual, partial);
  if (s.partials)
    with_width("batch_norm_act_sums", s, wide, [&](auto t, auto width) {
      using T = decltype(t);
      const dim3 block = block_shape(s.channels, width);
      const dim3 grid(unsigned(s.partials), blocks(s.channels, block.x * width));
      launch({grid, block, 0, cudaStream_t(stream)}, batch_norm_act_sums_kernel<T, width.value>,
             static_cast<const T*>(taken.dy), static_cast<const T*>(taken.x),
             static_cast<const T*>(taken.beside), channels, static_cast<T*>(dresidual), partial, s.rows,
             s.channels, s.rows_per_partial(), s.activation, s.eps);
    });
  launch({merge_grid(s.channels), kMergeBlock, 0, cudaStream_t(stream)}, batch_norm_act_sum_runs_kernel,
         partial, channels.variance, sums, s.partials, s.channels, s.eps);
}

void batch_norm_act_backward(const BatchNormActGradient& taken, const BatchNormActChannels& channels,
                             const float* sums, void* dx, const Shape& s, int device, void* stream) {
  if (s.rows == 0 || s.channels == 0) return;
  const DeviceGuard guard(device);
  const bool wide = aligned(channels) && aligned_for_vectors(taken.dy, taken.x, taken.beside, sums, dx);
  with_width("batch_norm_act_backward", s, wide, [&](auto t, auto width) {
    using T = decltype(t);
    const dim3 block = block_shape(s.channels, width);
    const dim3 grid(blocks(s.rows, block.y * kRowsOfThread), blocks(s.channels, block.x * width));
    launch({grid, block, 0, cudaStream_t(stream)}, batch_norm_act_backward_kernel<T, width.value>,
           static_cast<const T*>(taken.dy), static_cast<const T*>(taken.x),
           static_cast<const T*>(taken.beside), channels, sums, static_cast<T*>(dx), s.rows, s.channels,
           s.activation, s.eps);
  });
}

}  // namespace lspm::cuda
