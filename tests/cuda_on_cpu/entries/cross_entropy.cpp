// C entries to the CUDA kernels of cross_entropy: each returns what went wrong, or null.
#include "cross_entropy.h"

#include "entry.h"

using lspm::CrossEntropyShape;
using lspm::DType;

extern "C" {

const char* cross_entropy_forward(const void* logits, const void* target, const float* weight, void* loss,
                                  float* statistics, float* row_losses, const CrossEntropyShape* shape,
                                  int device, void* stream) {
  return message_of([&] {
    lspm::cuda::cross_entropy_forward(logits, target, weight, loss, statistics, row_losses, *shape, device,
                                      stream);
  });
}

const char* cross_entropy_backward(const void* dloss, const void* logits, const void* target,
                                   const float* weight, const float* statistics, void* dlogits,
                                   const CrossEntropyShape* shape, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::cross_entropy_backward(dloss, logits, target, weight, statistics, dlogits, *shape, device,
                                       stream);
  });
}

CrossEntropyShape* cross_entropy_shape(int64_t rows, int64_t classes, int64_t ignore_index, float smoothing,
                                       int reduction, int dtype, int probabilities) {
  static CrossEntropyShape shape;
  shape = {rows,
           classes,
           ignore_index,
           smoothing,
           static_cast<lspm::Reduction>(reduction),
           static_cast<DType>(dtype),
           probabilities != 0};
  return &shape;
}

}  // extern "C"
