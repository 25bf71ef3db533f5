// Layer norm and RMS norm over the last dimension, with or without a residual addition before it.
//
//   sum = x + residual (x where there is no residual), rounded to its dtype
//   y = (sum - mean) * rstd * weight + bias        mean = 0 in RMS norm
//
// Tensors are contiguous and row-major. "Or null" marks what may be absent (an input) or not wanted
// (an output).
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct LayerNormShape {
  int64_t rows, cols;
  // The backward sums dweight and dbias over this many runs of consecutive rows, then over the runs in
  // order: the bits of the result depend on this number, never on how many threads or blocks there are.
  int64_t partials;
  DType dtype;         // x, residual, sum, y and their gradients: f32, bf16 or f16
  DType weight_dtype;  // weight, bias and their gradients: dtype or f32
  bool centered;       // layer norm; false: RMS norm, which has no mean

  int64_t rows_per_partial() const { return partials ? (rows + partials - 1) / partials : 0; }
};

namespace cpu {
// residual, weight, bias: or null. sum: null where residual is. mean, rstd: (rows), or null; mean is null in
// RMS norm too.
void layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* sum,
                        void* y, float* mean, float* rstd, const LayerNormShape& shape, float eps,
                        int threads);

// sum: x where there was no residual. dsum, the gradient of sum: or null. weight: or null. dx is the gradient
// of x and of residual alike. dweight, dbias: or null. partial: (partials, 2, cols), scratch.
void layer_norm_backward(const void* dy, const void* dsum, const void* sum, const float* mean,
                         const float* rstd, const void* weight, void* dx, void* dweight, void* dbias,
                         float* partial, const LayerNormShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t. A failure of CUDA throws std::runtime_error.
void layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* sum,
                        void* y, float* mean, float* rstd, const LayerNormShape& shape, float eps, int device,
                        void* stream);
void layer_norm_backward(const void* dy, const void* dsum, const void* sum, const float* mean,
                         const float* rstd, const void* weight, void* dx, void* dweight, void* dbias,
                         float* partial, const LayerNormShape& shape, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
