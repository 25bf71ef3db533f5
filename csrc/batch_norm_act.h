// y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual), for every channel.
//
// Tensors are (rows, channels), contiguous: images whose channels lie innermost. "Or null": may be absent.
#pragma once
#include <cstdint>

#include "activation.h"
#include "dtype.h"

namespace lspm {

struct BatchNormActShape {
  int64_t rows, channels;
  // Reductions over rows go over this many runs of consecutive rows, then over the runs in order: the bits of
  // a result depend on it, never on how many threads or blocks there are. Runs behind the last row are empty.
  int64_t partials;
  DType dtype;  // x, residual, y and their gradients: f32, bf16 or f16
  Activation activation;
  float eps;

  int64_t rows_per_partial() const {  // a multiple of 32: runs begin where vectors are aligned
    return partials ? ((rows + partials - 1) / partials + 31) / 32 * 32 : 0;
  }
};
struct BatchNormActChannels {
  const float *weight, *bias, *mean, *variance;  // (channels); the first two or null; the biased variance
};
struct BatchNormActGradient {
  const void *dy, *x, *beside;  // beside: y where the activation is relu, else residual; or null
};

namespace cpu {
// partial: (partials, 3, channels), scratch: of each run its rows' number, mean and sum of squared deviations
// from that. x null: it is filled already, as by a convolution's epilogue, from runs of any lengths.
void batch_norm_act_statistics(const void* x, float* partial, float* mean, float* variance,
                               const BatchNormActShape&, int threads);
void batch_norm_act_forward(const void* x, const void* residual, const BatchNormActChannels&, void* y,
                            const BatchNormActShape&, int threads);
// sums: (2, channels), over rows of g = dy * activation' and of g * (x - mean) / sqrt(variance + eps), which
// are dbias and dweight. dresidual: g, or null. partial: (partials, 2, channels), scratch.
void batch_norm_act_sums(const BatchNormActGradient&, const BatchNormActChannels&, void* dresidual,
                         float* partial, float* sums, const BatchNormActShape&, int threads);
// sums: as above, over as many rows as there are here; null where mean and variance are constants.
void batch_norm_act_backward(const BatchNormActGradient&, const BatchNormActChannels&, const float* sums,
                             void* dx, const BatchNormActShape&, int threads);
}  // namespace cpu

namespace cuda {  // the same on GPU `device`, queued on `stream`; a failure throws std::runtime_error
void batch_norm_act_statistics(const void* x, float* partial, float* mean, float* variance,
                               const BatchNormActShape&, int device, void* stream);
void batch_norm_act_forward(const void* x, const void* residual, const BatchNormActChannels&, void* y,
                            const BatchNormActShape&, int device, void* stream);
void batch_norm_act_sums(const BatchNormActGradient&, const BatchNormActChannels&, void* dresidual,
                         float* partial, float* sums, const BatchNormActShape&, int device, void* stream);
void batch_norm_act_backward(const BatchNormActGradient&, const BatchNormActChannels&, const float* sums,
                             void* dx, const BatchNormActShape&, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
