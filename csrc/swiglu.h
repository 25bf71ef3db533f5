// A gated linear unit behind its two linear layers (SwiGLU, GEGLU).
//
//   y = activation(gate) * up      dup = dy * activation(gate)      dgate = dy * up * activation'(gate)
//
// The last dimension of each tensor is contiguous; rows lie `stride` elements apart, so that gate and up, and
// their gradients, may be the halves of one tensor.
#pragma once
#include <cstdint>

#include "activation.h"
#include "dtype.h"

namespace lspm {

struct SwigluShape {
  int64_t rows, cols;
  DType dtype;            // of all tensors: f32, bf16 or f16
  Activation activation;  // silu, gelu or gelu_tanh
};

// Rows of a tensor: where the first begins, and how far apart they are.
struct Rows {
  void* data;
  int64_t stride;
};

namespace cpu {
// gate, up: (rows, cols). y: (rows, cols), contiguous.
void swiglu_forward(const Rows& gate, const Rows& up, void* y, const SwigluShape& shape, int threads);

// dy: contiguous; dgate may be dy. y: the forward's, computed again, or null.
void swiglu_backward(const void* dy, const Rows& gate, const Rows& up, const Rows& dgate, const Rows& dup,
                     void* y, const SwigluShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
