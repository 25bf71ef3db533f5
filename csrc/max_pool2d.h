// Max pooling of images, channels last.
//
//   y[n, i, j, c] = the largest of x[n, i * stride - padding + a * dilation, ..., c] over the taps a, b that
//                   lie inside; a NaN is larger than all
//
// x: (batch, height, width, channels), y likewise, contiguous. A position is the tap a * kernel + b that was
// taken, the first of equal ones: a byte where a window has at most 256 taps, else an int32.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "pool_axis.h"

namespace lspm {

struct MaxPool2dShape {
  int64_t batch, channels;
  PoolAxis rows, cols;
  DType dtype;  // x, y and their gradients: f32, bf16 or f16

  bool bytes() const { return rows.kernel * cols.kernel <= 256; }  // of positions
  int64_t inputs() const { return batch * rows.in * cols.in * channels; }
  int64_t outputs() const { return batch * rows.out * cols.out * channels; }
};

namespace cpu {
// positions: (batch, out rows, out cols, channels), or null where no backward follows.
void max_pool2d_forward(const void* x, void* y, void* positions, const MaxPool2dShape& shape, int threads);
void max_pool2d_backward(const void* dy, const void* positions, void* dx, const MaxPool2dShape& shape,
                         int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t. A failure of CUDA throws std::runtime_error.
void max_pool2d_forward(const void* x, void* y, void* positions, const MaxPool2dShape& shape, int device,
                        void* stream);
void max_pool2d_backward(const void* dy, const void* positions, void* dx, const MaxPool2dShape& shape,
                         int device, void* stream);
}  // namespace cuda

}  // namespace lspm
