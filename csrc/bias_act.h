// A bias and an activation behind it: what stands between the two linear layers of a transformer's MLP.
//
//   y = activation(x + bias)        dx = dy * activation'(x + bias)        dbias = the sum of dx over rows
//
// Tensors are contiguous and row-major. "Or null" marks what may be absent (an input) or not wanted (an
// output).
#pragma once
#include <cstdint>

#include "activation.h"
#include "dtype.h"

namespace lspm {

struct BiasActShape {
  int64_t rows, cols;
  // dbias is summed over this many runs of consecutive rows, then over the runs in order: the bits of the
  // result depend on this number, never on how many threads there are.
  int64_t partials;
  DType dtype;            // x, y and their gradients: f32, bf16 or f16
  DType bias_dtype;       // bias and dbias: dtype or f32; dtype where there is none
  Activation activation;  // relu, silu, gelu or gelu_tanh

  int64_t rows_per_partial() const { return partials ? (rows + partials - 1) / partials : 0; }
};

namespace cpu {
// x, y: (rows, cols); y may be x. bias: (cols), or null.
void bias_act_forward(const void* x, const void* bias, void* y, const BiasActShape& shape, int threads);

// dx may be dy. y: the forward's, computed again, or null. dbias: or null. partial: (partials, cols),
// scratch; null where dbias is.
void bias_act_backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias, void* y,
                       float* partial, const BiasActShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
