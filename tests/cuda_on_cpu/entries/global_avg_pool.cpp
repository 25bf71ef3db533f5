// C entries to the CUDA kernels of global_avg_pool: each returns what went wrong, or null.
#include "global_avg_pool.h"

#include "entry.h"

using lspm::DType;
using lspm::GlobalAvgPoolShape;

extern "C" {

const char* global_avg_pool_forward(const void* x, void* y, const GlobalAvgPoolShape* shape, int device,
                                    void* stream) {
  return message_of([&] { lspm::cuda::global_avg_pool_forward(x, y, *shape, device, stream); });
}

const char* global_avg_pool_backward(const void* dy, void* dx, const GlobalAvgPoolShape* shape, int device,
                                     void* stream) {
  return message_of([&] { lspm::cuda::global_avg_pool_backward(dy, dx, *shape, device, stream); });
}

GlobalAvgPoolShape* global_avg_pool_shape(int64_t batch, int64_t pixels, int64_t channels, int dtype) {
  static GlobalAvgPoolShape shape;
  shape = {batch, pixels, channels, static_cast<DType>(dtype)};
  return &shape;
}

}  // extern "C"
