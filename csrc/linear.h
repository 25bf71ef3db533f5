// y = x @ weight.T + bias for few rows of x, which is bound by reading the weight, or a prompt's.
//
//   y[r, n] = bias[n] + sum over k of x[r, k] * weight[n, k] * scales[n, k / group()]
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct LinearShape {
  int64_t rows, outputs, inputs;
  int64_t weight_stride;  // elements from one row of weight to the next
  int64_t groups;         // of columns with a scale each: one, or of a multiple of 32
  DType dtype;            // of x and y: f32, bf16 or f16
  DType weight_dtype;     // f32, bf16, f16 or i8, which has scales
  DType bias_dtype;       // x's or f32

  int64_t group() const { return inputs / groups; }
};

namespace cpu {
// x: (rows, inputs), contiguous. weight: (outputs, inputs). bias: (outputs), or null. scales: (outputs,
// groups), f32, or null. y: (rows, outputs), contiguous. Sums are in f32.
void linear_forward(const void* x, const void* weight, const void* bias, const float* scales, void* y,
                    const LinearShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
