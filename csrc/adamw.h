// One step of AdamW on a list of tensors, in place, and the norm of their gradients.
//
//   g = scale * grad, or its negative to maximize
//   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g ** 2;  w = v, or max(w, v) where there is w
//   param -= lr * weight_decay * param + lr / (1 - beta1 ** step) * m / (sqrt(w / (1 - beta2 ** step)) + eps)
//
// Gradients are scaled where they are read, and do not change.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

// The tensors of one parameter, all with the same layout and without gaps.
struct AdamwTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last one may be null
  float* master;           // or null: the parameter in float32, of which param is the rounded copy
  int64_t elements, step;  // step from 1 on
};

struct AdamwStep {
  DType dtype, state_dtype;  // of param and grad, and of the moments: that or f32
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  // bf16 alone: rounds up as often as the part that is lost is of the step between two values. Element e of
  // tensor t takes word e / 16 % 4 of the counter c = e / 64 * 16 + e % 16, which is (c, t, 0, c >> 32), of
  // Philox4x32-10; its high half is not below the part lost where it rounds down.
  bool stochastic;
  uint64_t seed;
};

struct AdamwGrad {
  const void* data;
  int64_t elements;
};

namespace cpu {
// scale: one number, or null for 1.
void adamw_update(const AdamwTensor* tensors, int64_t count, const float* scale, const AdamwStep& step,
                  int threads);
// norm: the root of the sum of all squares, which are added up in float64.
void adamw_norm(const AdamwGrad* grads, int64_t count, DType dtype, float* norm, int threads);
}  // namespace cpu

}  // namespace lspm
