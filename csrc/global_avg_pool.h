// The mean of every channel of an image over all its pixels, channels last.
//
//   y[n, c] = sum over p of x[n, p, c] / pixels
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct GlobalAvgPoolShape {
  int64_t batch, pixels, channels;
  DType dtype;  // x, y and their gradients: f32, bf16 or f16
};

namespace cpu {
// x: (batch, pixels, channels). y: (batch, channels).
void global_avg_pool_forward(const void* x, void* y, const GlobalAvgPoolShape& shape, int threads);
void global_avg_pool_backward(const void* dy, void* dx, const GlobalAvgPoolShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t. A failure of CUDA throws std::runtime_error.
void global_avg_pool_forward(const void* x, void* y, const GlobalAvgPoolShape& shape, int device,
                             void* stream);
void global_avg_pool_backward(const void* dy, void* dx, const GlobalAvgPoolShape& shape, int device,
                              void* stream);
}  // namespace cuda

}  // namespace lspm
