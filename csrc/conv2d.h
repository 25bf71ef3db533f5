// Two-dimensional convolution as torch means it (a correlation), with an epilogue.
//
//   z[n, i, j, k] = sum over r, s, c of x[n, i sh + r dh - ph, j sw + s dw - pw, c] weight[k, c, r, s]
//   y = activation(z scale[k] + shift[k] + residual)
//
// where c runs over the channels of k's group and what lies outside of x is 0. x, y and residual are
// contiguous (N, H, W, C), which torch calls channels_last; sums are in float. "Or null": may be absent.
#pragma once
#include "activation.h"
#include "dtype.h"

namespace lspm {
struct Conv2dShape {
  int64_t batch, height, width, channels;  // of x
  int64_t out_height, out_width, filters;  // of y
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;  // above and on the left; below and on the right out_height, out_width tell
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int64_t weight_strides[4];  // in elements, of weight (K, C / groups, R, S)
  DType dtype;                // of x, weight, residual, y and their gradients: f32, bf16 or f16

  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t taps() const { return kernel_h * kernel_w; }
  // Elements of the weight as the CUDA kernels lay it out: what a sum reads side by side, in whole vectors.
  static int64_t in_vectors(int64_t n) { return (n + 7) / 8 * 8; }
  int64_t packed_forward() const { return filters * in_vectors(taps() * group_channels()); }
  int64_t packed_backward() const { return channels * in_vectors(taps() * group_filters()); }
};

struct Conv2dEpilogue {
  const float *scale, *shift;  // (K), or null
  const void* residual;        // as y, or null
  Activation activation;
};

namespace cpu {
// The weight as the forward reads it, whatever the images' size.
int64_t conv2d_packed_bytes(const Conv2dShape& shape);
void conv2d_pack(const void* weight, void* packed, const Conv2dShape& shape, int threads);
// packed: or null. statistics: (2, K), the mean and biased variance of y over all pixels; or null.
void conv2d_forward(const void* x, const void* weight, const void* packed, const Conv2dEpilogue& epilogue,
                    void* y, float* statistics, const Conv2dShape& shape, int threads);
// Gradients of z: dx of x and dweight of weight, which lies as weight does; either may be null.
void conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight,
                     const Conv2dShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// dtype: bf16 or f16. packed: scratch, of packed_forward() or packed_backward() elements. partial: scratch,
// (partials, K, R, S, C / groups), sums of dweight over runs of pixels: its bits depend on their number only.
void conv2d_forward(const void* x, const void* weight, const Conv2dEpilogue& epilogue, void* y, void* packed,
                    const Conv2dShape& shape, int device, void* stream);
void conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight, void* packed,
                     float* partial, int64_t partials, const Conv2dShape& shape, int device, void* stream);
}  // namespace cuda
}  // namespace lspm
