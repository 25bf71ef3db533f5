// Layer norm (Ba et al. 2016) and RMS norm (Zhang and Sennrich 2019) after an optional residual addition.
//
// Forward: blockDim.x threads own a row, of which each keeps up to 16 elements in registers from the load to
// the store, so the two passes of the variance cost no memory. Backward: a block owns a run of rows and a
// thread the same columns of all of them, so weight, dweight and dbias stay in registers too; what the rows
// side by side in a block have summed is added up in 16 KiB of shared memory, once a run. Rows wider than
// 16384 elements (8192 backward) and rows that no vector fits are read again, from L2.
// Bytes per element of s bytes: forward 2 s, with a residual 4 s; backward 3 s, with dsum 4 s.
#include "../layer_norm.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

constexpr int kElements = 16;  // that a thread keeps of a row
constexpr int kForwardThreads = 1024;
constexpr int kBackwardThreads = 512;                     // 128 registers a thread: data, weight, two sums
constexpr int kForwardBlock = 128, kBackwardBlock = 256;  // short rows share a block of so many threads
template <int kWidth, bool kHeld>
constexpr int kVectorsOf = kHeld ? kElements / kWidth : (kWidth > 1 ? 1 : 4);

// Calls body(v, col) for every vector of a row that this thread owns: v is its register, col its first
// column. kHeld: one round over the registers covers the row.
template <int kVectors, int kWidth, bool kHeld, class Body>
__device__ __forceinline__ void for_each_vector(int64_t cols, Body body) {
  const int64_t stride = int64_t(blockDim.x) * kWidth;
  for (int64_t base = int64_t(threadIdx.x) * kWidth; base < cols; base += kVectors * stride) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (base + v * stride < cols) body(v, base + v * stride);
    if (kHeld) break;
  }
}

template <bool kHeld, int kWidth, class T>
__device__ __forceinline__ Vec<T, kWidth> load_first(const T* from) {
  if constexpr (kHeld)
    return load_streaming<kWidth>(from);
  else
    return load<kWidth>(from);  // it will be read again
}

template <class T, class W, int kWidth, bool kHeld>
__global__ void __launch_bounds__(kForwardThreads, 1)
    layer_norm_forward_kernel(const T* __restrict__ x, const T* __restrict__ residual,
                              const W* __restrict__ weight, const W* __restrict__ bias, T* sum, T* y,
                              float* mean, float* rstd, int64_t rows, int64_t cols, bool centered,
                              float eps) {
  constexpr int kVectors = kVectorsOf<kWidth, kHeld>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, start = row * cols;
  const int64_t own_cols = row < rows ? cols : 0;  // threads past the last row still take part in the sums
  const T* again = residual ? sum : x;
  Vec<T, kWidth> held[kVectors];

  float total = 0.0f;
  for_each_vector<kVectors, kWidth, kHeld>(own_cols, [&](int v, int64_t col) {
    held[v] = load_first<kHeld, kWidth>(x + start + col);
    if (residual) {
      const Vec<T, kWidth> added = load_first<kHeld, kWidth>(residual + start + col);
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        held[v].at[e] = from_float<T>(to_float(held[v].at[e]) + to_float(added.at[e]));
      store(sum + start + col, held[v]);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) total += to_float(held[v].at[e]);
  });
  const float row_mean = centered ? row_sum(total) / cols : 0.0f;

  float squares = 0.0f;
  for_each_vector<kVectors, kWidth, kHeld>(own_cols, [&](int v, int64_t col) {
    if (!kHeld) held[v] = load<kWidth>(again + start + col);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float difference = to_float(held[v].at[e]) - row_mean;
      squares += difference * difference;
    }
  });
  const float row_rstd = 1.0f / sqrtf(row_sum(squares) / cols + eps);

  for_each_vector<kVectors, kWidth, kHeld>(own_cols, [&](int v, int64_t col) {
    if (!kHeld) held[v] = load<kWidth>(again + start + col);
    float out[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) out[e] = (to_float(held[v].at[e]) - row_mean) * row_rstd;
    if (weight) {
      const Vec<W, kWidth> scale = load<kWidth>(weight + col);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) out[e] *= to_float(scale.at[e]);
    }
    if (bias) {
      const Vec<W, kWidth> shift = load<kWidth>(bias + col);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) out[e] += to_float(shift.at[e]);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) held[v].at[e] = from_float<T>(out[e]);
    store(y + start + col, held[v]);
  });
  if (threadIdx.x == 0 && row < rows) {
    if (mean) mean[row] = row_mean;
    if (rstd) rstd[row] = row_rstd;
  }
}

template <int kWidth>
__device__ __forceinline__ void add_to(float* to, const Vec<float, kWidth>& values) {
  Vec<float, kWidth> sums = load<kWidth>(to);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sums.at[e] += values.at[e];
  store(to, sums);
}

// Adds up what the rows of a block have summed for the same columns, in order, and stores it.
template <int kVectors, int kWidth>
__device__ __forceinline__ void store_column_sums(const float (&own)[kVectors][kWidth], float* out,
                                                  int64_t cols) {
  using Sums = Vec<float, kWidth>;
  SHARED(Sums, tile, [kBackwardBlock * kVectors]);
  const int row_vectors = int(cols / kWidth);
  if (blockDim.y > 1) {
    __syncthreads();  // the previous call has read its sums
    for_each_vector<kVectors, kWidth, true>(cols, [&](int v, int64_t col) {
      Sums& to = tile[threadIdx.y * row_vectors + col / kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) to.at[e] = own[v][e];
    });
    __syncthreads();
  }
  if (threadIdx.y > 0) return;
  for_each_vector<kVectors, kWidth, true>(cols, [&](int v, int64_t col) {
    Sums sums;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums.at[e] = own[v][e];
    for (int y = 1; y < blockDim.y; ++y) {
      const Sums added = tile[y * row_vectors + col / kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums.at[e] += added.at[e];
    }
    store(out + col, sums);
  });
}

// partial: null where neither dweight nor dbias is wanted.
template <class T, class W, int kWidth, bool kHeld>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    layer_norm_backward_kernel(const T* __restrict__ dy, const T* __restrict__ dsum,
                               const T* __restrict__ sum, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const W* __restrict__ weight, T* dx,
                               float* partial, int64_t rows, int64_t cols, int64_t rows_per_run,
                               bool centered) {
  constexpr int kVectors = kVectorsOf<kWidth, kHeld>;
  const int64_t first = blockIdx.x * rows_per_run;
  const int64_t end = first + rows_per_run < rows ? first + rows_per_run : rows;
  float* const run_dweight = partial + int64_t(blockIdx.x) * 2 * cols;
  float* const run_dbias = run_dweight + cols;
  float dweight[kVectors][kWidth] = {}, dbias[kVectors][kWidth] = {}, scale[kVectors][kWidth];
  Vec<T, kWidth> grad[kVectors], held[kVectors];

  auto load_scale = [&](int v, int64_t col) {
    if (weight) {
      const Vec<W, kWidth> loaded = load<kWidth>(weight + col);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) scale[v][e] = to_float(loaded.at[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) scale[v][e] = 1.0f;
    }
  };
  if (kHeld) {
    for_each_vector<kVectors, kWidth, kHeld>(cols, load_scale);
  } else if (partial) {
    for_each_vector<kVectors, kWidth, kHeld>(cols, [&](int, int64_t col) {
      store(run_dweight + col, Vec<float, kWidth>{});
      store(run_dbias + col, Vec<float, kWidth>{});
    });
  }

  for (int64_t base = first; base < end; base += blockDim.y) {
    const int64_t row = base + threadIdx.y, start = row * cols;
    const int64_t own_cols = row < end ? cols : 0;  // threads past the run still take part in the sums
    const float row_mean = centered && own_cols ? mean[row] : 0.0f;
    const float row_rstd = own_cols ? rstd[row] : 0.0f;

    float2 sums = {0.0f, 0.0f};  // of the gradient of the normalised row, and of that times the row
    for_each_vector<kVectors, kWidth, kHeld>(own_cols, [&](int v, int64_t col) {
      grad[v] = load_first<kHeld, kWidth>(dy + start + col);
      held[v] = load_first<kHeld, kWidth>(sum + start + col);
      if (!kHeld) load_scale(v, col);
      Vec<float, kWidth> row_dweight, row_dbias;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float normalised = (to_float(held[v].at[e]) - row_mean) * row_rstd;
        const float dnormalised = to_float(grad[v].at[e]) * scale[v][e];
        sums.x += dnormalised;
        sums.y += dnormalised * normalised;
        row_dweight.at[e] = to_float(grad[v].at[e]) * normalised;
        row_dbias.at[e] = to_float(grad[v].at[e]);
        if (kHeld) {
          dweight[v][e] += row_dweight.at[e];
          dbias[v][e] += row_dbias.at[e];
        }
      }
      if (!kHeld && partial) {
        add_to(run_dweight + col, row_dweight);
        add_to(run_dbias + col, row_dbias);
      }
    });
    sums = row_sum(sums);
    const float mean_total = centered ? sums.x / cols : 0.0f, mean_projection = sums.y / cols;

    for_each_vector<kVectors, kWidth, kHeld>(own_cols, [&](int v, int64_t col) {
      if (!kHeld) {
        grad[v] = load<kWidth>(dy + start + col);
        held[v] = load<kWidth>(sum + start + col);
        load_scale(v, col);
      }
      float out[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float normalised = (to_float(held[v].at[e]) - row_mean) * row_rstd;
        // Not fused with the subtraction: what is left of a row of equal products must be 0.
        const float dnormalised = __fmul_rn(to_float(grad[v].at[e]), scale[v][e]);
        out[e] = (dnormalised - mean_total - normalised * mean_projection) * row_rstd;
      }
      if (dsum) {
        const Vec<T, kWidth> added = load_first<kHeld, kWidth>(dsum + start + col);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) out[e] += to_float(added.at[e]);
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) grad[v].at[e] = from_float<T>(out[e]);
      store(dx + start + col, grad[v]);
    });
  }
  if (kHeld && partial) {
    store_column_sums(dweight, run_dweight, cols);
    store_column_sums(dbias, run_dbias, cols);
  }
}

// One thread per column and gradient: blockIdx.y 0 is dweight, 1 is dbias.
template <class W>
__global__ void layer_norm_sum_kernel(const float* __restrict__ partial, W* dweight, W* dbias,
                                      int64_t partials, int64_t cols) {
  const int64_t col = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  W* out = blockIdx.y ? dbias : dweight;
  if (col >= cols || !out) return;
  float total = 0.0f;
#pragma unroll 16
  for (int64_t p = 0; p < partials; ++p) total += partial[(2 * p + blockIdx.y) * cols + col];
  out[col] = from_float<W>(total);
}

// Threads of a row, in whole warps and at most `most`, and how many rows share a block of `block` threads.
dim3 block_shape(int64_t cols, int block, int most) {
  const int64_t warps = (cols + kWarp * kElements - 1) / (kWarp * kElements);
  const int threads = int(warps * kWarp < most ? warps * kWarp : most);
  return dim3(threads, threads < block ? block / threads : 1);
}

}  // namespace

void layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* sum,
                        void* y, float* mean, float* rstd, const LayerNormShape& shape, float eps, int device,
                        void* stream) {
  with_types("layer_norm_forward", shape.dtype, "weight_dtype", shape.weight_dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    using W = typename decltype(types)::Parameter;
    if (shape.rows == 0 || shape.cols == 0) return;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    auto* kernel = layer_norm_forward_kernel<T, W, 1, false>;
    if (shape.cols % kWidth == 0 && aligned_for_vectors(x, residual, weight, bias, sum, y))
      kernel = shape.cols <= kForwardThreads * kElements ? layer_norm_forward_kernel<T, W, kWidth, true>
                                                         : layer_norm_forward_kernel<T, W, kWidth, false>;
    const DeviceGuard guard(device);
    const dim3 block = block_shape(shape.cols, kForwardBlock, kForwardThreads);
    launch({unsigned((shape.rows + block.y - 1) / block.y), block, 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const W*>(weight),
           static_cast<const W*>(bias), static_cast<T*>(sum), static_cast<T*>(y), mean, rstd, shape.rows,
           shape.cols, shape.centered, eps);
  });
}

void layer_norm_backward(const void* dy, const void* dsum, const void* sum, const float* mean,
                         const float* rstd, const void* weight, void* dx, void* dweight, void* dbias,
                         float* partial, const LayerNormShape& shape, int device, void* stream) {
  with_types("layer_norm_backward", shape.dtype, "weight_dtype", shape.weight_dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    using W = typename decltype(types)::Parameter;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    if (shape.cols == 0) return;
    const bool weights = dweight || dbias;
    const DeviceGuard guard(device);
    if (shape.rows > 0) {
      auto* kernel = layer_norm_backward_kernel<T, W, 1, false>;
      dim3 block(kBackwardBlock);
      if (shape.cols % kWidth == 0 && aligned_for_vectors(dy, dsum, sum, weight, dx, partial)) {
        const bool held = shape.cols <= kBackwardThreads * kElements;
        kernel = held ? layer_norm_backward_kernel<T, W, kWidth, true>
                      : layer_norm_backward_kernel<T, W, kWidth, false>;
        if (held) block = block_shape(shape.cols, kBackwardBlock, kBackwardThreads);
      }
      // Without weight gradients nothing ties a block to a run: as many rows as it holds at a time.
      const int64_t rows_per_run = weights ? shape.rows_per_partial() : block.y;
      const int64_t runs = weights ? shape.partials : (shape.rows + block.y - 1) / block.y;
      launch({unsigned(runs), block, 0, cudaStream_t(stream)}, kernel, static_cast<const T*>(dy),
             static_cast<const T*>(dsum), static_cast<const T*>(sum), mean, rstd,
             static_cast<const W*>(weight), static_cast<T*>(dx), weights ? partial : nullptr, shape.rows,
             shape.cols, rows_per_run, shape.centered);
    }
    if (weights) {
      constexpr int kThreads = 64;
      launch({dim3(unsigned((shape.cols + kThreads - 1) / kThreads), 2), kThreads, 0, cudaStream_t(stream)},
             layer_norm_sum_kernel<W>, partial, static_cast<W*>(dweight), static_cast<W*>(dbias),
             shape.rows > 0 ? shape.partials : 0, shape.cols);
    }
  });
}

}  // namespace lspm::cuda
