// C entries to the CUDA kernels of layer norm: each returns what went wrong, or null.
#include "layer_norm.h"

#include "entry.h"

using lspm::DType;
using lspm::LayerNormShape;

extern "C" {

const char* layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias,
                               void* sum, void* y, float* mean, float* rstd, const LayerNormShape* shape,
                               float eps, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::layer_norm_forward(x, residual, weight, bias, sum, y, mean, rstd, *shape, eps, device,
                                   stream);
  });
}

const char* layer_norm_backward(const void* dy, const void* dsum, const void* sum, const float* mean,
                                const float* rstd, const void* weight, void* dx, void* dweight, void* dbias,
                                float* partial, const LayerNormShape* shape, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::layer_norm_backward(dy, dsum, sum, mean, rstd, weight, dx, dweight, dbias, partial, *shape,
                                    device, stream);
  });
}

LayerNormShape* layer_norm_shape(int64_t rows, int64_t cols, int64_t partials, int dtype, int weight_dtype,
                                 int centered) {
  static LayerNormShape shape;
  shape = {rows, cols, partials, static_cast<DType>(dtype), static_cast<DType>(weight_dtype), centered != 0};
  return &shape;
}

}  // extern "C"
