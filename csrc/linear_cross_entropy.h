// The cross entropy of rows of logits that exist a block at a time: between the product that makes a block,
// the classes [first, first + cols) of all rows, and the products that take the block's gradient.
//
//   x = softcap * tanh(logits / softcap), or logits where softcap is 0
//   loss = cross_entropy(x, target, weight) as in cross_entropy.h + z_loss * weight[target] * lse^2
//   lse = log(sum over c of exp(x[c]))
//
// Rows whose class is ignore_index have loss and gradient 0; a class that is none makes both NaN.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct LinearCrossEntropyShape {
  int64_t rows, cols;
  int64_t first, classes, ignore_index;
  float smoothing, z_loss, softcap;
  DType dtype;  // of the logits: f32, bf16 or f16

  bool begins() const { return first == 0; }
  bool ends() const { return first + cols == classes; }
  // Of each row the largest x, the logarithm of sum(exp(x - largest)) and sum(q): what the backward reads.
  int64_t statistics() const { return 3 * rows; }
  // Before the last block it is the sum instead of its logarithm, and two numbers more stand behind.
  int64_t kept() const { return 5 * rows; }
};

namespace cpu {
// Adds a block to what is kept of rows; the blocks come in order, and the last one ends it and gives the
// losses. logits: (rows, cols). target: (rows). weight: (classes), or null. kept: (5, rows). losses: (rows).
void linear_cross_entropy_forward(const void* logits, const int64_t* target, const float* weight, float* kept,
                                  float* losses, const LinearCrossEntropyShape& shape, int threads);
// Turns a block into its gradient, in place. dloss: (rows). dlse: (rows), or null. statistics: (3, rows).
// dbias: (cols), to which the sums of columns are added, or null.
void linear_cross_entropy_backward(const float* dloss, const float* dlse, void* logits, const int64_t* target,
                                   const float* weight, const float* statistics, float* dbias,
                                   const LinearCrossEntropyShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
