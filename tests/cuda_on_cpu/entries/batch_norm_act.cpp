// C entries to the CUDA kernels of batch_norm_act: each returns what went wrong, or null.
#include "batch_norm_act.h"

#include "entry.h"

using namespace lspm;

extern "C" {

const char* batch_norm_act_statistics(const void* x, float* partial, float* mean, float* variance,
                                      const BatchNormActShape* shape, int device, void* stream) {
  return message_of(
      [&] { cuda::batch_norm_act_statistics(x, partial, mean, variance, *shape, device, stream); });
}

const char* batch_norm_act_forward(const void* x, const void* residual, const float* weight,
                                   const float* bias, const float* mean, const float* variance, void* y,
                                   const BatchNormActShape* shape, int device, void* stream) {
  return message_of([&] {
    cuda::batch_norm_act_forward(x, residual, {weight, bias, mean, variance}, y, *shape, device, stream);
  });
}

const char* batch_norm_act_sums(const void* dy, const void* x, const void* beside, const float* weight,
                                const float* bias, const float* mean, const float* variance, void* dresidual,
                                float* partial, float* sums, const BatchNormActShape* shape, int device,
                                void* stream) {
  return message_of([&] {
    cuda::batch_norm_act_sums({dy, x, beside}, {weight, bias, mean, variance}, dresidual, partial, sums,
                              *shape, device, stream);
  });
}

const char* batch_norm_act_backward(const void* dy, const void* x, const void* beside, const float* weight,
                                    const float* bias, const float* mean, const float* variance,
                                    const float* sums, void* dx, const BatchNormActShape* shape, int device,
                                    void* stream) {
  return message_of([&] {
    cuda::batch_norm_act_backward({dy, x, beside}, {weight, bias, mean, variance}, sums, dx, *shape, device,
                                  stream);
  });
}

BatchNormActShape* batch_norm_act_shape(int64_t rows, int64_t channels, int64_t partials, int dtype,
                                        int activation, float eps) {
  static BatchNormActShape shape;
  shape = {rows, channels, partials, static_cast<DType>(dtype), static_cast<Activation>(activation), eps};
  return &shape;
}

}  // extern "C"
