// The cross entropy of rows of logits and of targets, classes or probabilities of all classes.
//
//   loss = sum over c of -q[c] * log(softmax(logits)[c])
//   q[c] = weight[c] * ((1 - smoothing) * p[c] + smoothing / classes)    p: 1 at the target's class, else 0
//
// Of a class the smoothed part alone is weighted by weight[c], as here, and the other by weight[target]. Rows
// whose class is ignore_index have loss 0, and so has their gradient.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

struct CrossEntropyShape {
  int64_t rows, classes, ignore_index;
  float smoothing;
  Reduction reduction;  // mean: over the weights of the targets' classes, or over rows of probabilities
  DType dtype;          // of logits, probabilities, loss and their gradients: f32, bf16 or f16
  bool probabilities;

  int64_t losses() const { return reduction == Reduction::none ? rows : 1; }
  // The largest logit of each row, then the logarithms of sum(exp(logit - largest)), then sum(q), and last
  // of all what the losses of rows are divided by.
  int64_t statistics() const { return 3 * rows + 1; }
};

namespace cpu {
// logits: (rows, classes). target: (rows), int64, or (rows, classes) of dtype. weight: (classes), or null.
// loss: (losses). statistics: or null. A class that is none throws std::invalid_argument.
void cross_entropy_forward(const void* logits, const void* target, const float* weight, void* loss,
                           float* statistics, const CrossEntropyShape& shape, int threads);
void cross_entropy_backward(const void* dloss, const void* logits, const void* target, const float* weight,
                            const float* statistics, void* dlogits, const CrossEntropyShape& shape,
                            int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t. A failure of CUDA throws std::runtime_error.
// statistics is not null; row_losses: (2, rows), scratch. A class that is none makes the loss NaN.
void cross_entropy_forward(const void* logits, const void* target, const float* weight, void* loss,
                           float* statistics, float* row_losses, const CrossEntropyShape& shape, int device,
                           void* stream);
void cross_entropy_backward(const void* dloss, const void* logits, const void* target, const float* weight,
                            const float* statistics, void* dlogits, const CrossEntropyShape& shape,
                            int device, void* stream);
}  // namespace cuda

}  // namespace lspm
