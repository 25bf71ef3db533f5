// Batch norm of every channel over all rows, a residual addition and an activation, in one pass.
//
//   y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)
//
// x is (rows, channels), contiguous: an image batch whose channels lie innermost. "Or null" marks what may be
// absent (an input) or not wanted (an output).
#pragma once
#include <cstdint>

#include "activation.h"
#include "dtype.h"

namespace lspm {

struct BatchNormActShape {
  int64_t rows, channels;
  // Reductions over rows go over this many runs of consecutive rows, then over the runs in order: the bits of
  // a result depend on this number, never on how many threads or blocks there are. Runs behind the last row
  // are empty.
  int64_t partials;
  DType dtype;  // x, residual, y and their gradients: f32, bf16 or f16
  Activation activation;
  float eps;

  static constexpr int64_t kRowUnit = 32;  // runs begin where vectors are aligned, however few the channels
  int64_t rows_per_partial() const {
    return partials ? ((rows + partials - 1) / partials + kRowUnit - 1) / kRowUnit * kRowUnit : 0;
  }
};

// (channels) each; weight and bias: or null. The variance is biased.
struct BatchNormActChannels {
  const float *weight, *bias, *mean, *variance;
};

namespace cpu {
// mean, variance: (channels). partial: (partials, 3, channels), scratch: for each run of rows the number of
// its rows, their mean and their sum of squared deviations from it. x null: the caller has filled partial
// already, as a convolution's epilogue does while it has the rows at hand; its runs may be of any lengths.
void batch_norm_act_statistics(const void* x, float* partial, float* mean, float* variance,
                               const BatchNormActShape& shape, int threads);
void batch_norm_act_forward(const void* x, const void* residual, const BatchNormActChannels& channels,
                            void* y, const BatchNormActShape& shape, int threads);
// g = dy * activation', the gradient of residual. beside: what the forward had beside x, y where the
// activation is relu and residual where it is another; null where there was no residual. dresidual: g, or
// null. sums: (2, channels), the sums over rows of g and of g * (x - mean) / sqrt(variance + eps), which are
// dbias and dweight. partial: (partials, 2, channels), scratch.
void batch_norm_act_sums(const void* dy, const void* x, const void* beside,
                         const BatchNormActChannels& channels, void* dresidual, float* partial, float* sums,
                         const BatchNormActShape& shape, int threads);
// sums, over as many rows as there are here: of batch_norm_act_sums, or null where mean and variance are
// constants.
void batch_norm_act_backward(const void* dy, const void* x, const void* beside,
                             const BatchNormActChannels& channels, const float* sums, void* dx,
                             const BatchNormActShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
