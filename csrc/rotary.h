// Rotary position embedding: a rotation of pairs of dimensions, by an angle for each position and pair.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)
//
// Pair i of a row is elements i and half + i or, where interleaved, 2 i and 2 i + 1. What lies behind the
// first 2 * half elements of a row is passed through.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct RotaryShape {
  int64_t batch, heads, rows, dim;
  int64_t half;                                   // pairs of a row: 1 to dim / 2
  int64_t positions;                              // rows of cos and sin
  int64_t batch_stride, head_stride, row_stride;  // of x, in elements; the last stride is 1
  int64_t offset;                                 // the position of row 0 where there are no offsets
  DType dtype;                                    // x and out: f32, bf16 or f16
  DType table_dtype;                              // cos and sin: dtype or f32
  bool interleaved;
  bool inverse;  // by the negative angle, which is the gradient

  int64_t elements() const { return batch * heads * rows * dim; }
};

namespace cpu {
// x: (batch, heads, rows, dim). cos, sin: (positions, half). out: (batch, rows, heads, dim). offsets:
// (batch), the position of each sequence's row 0, or null. Every position must be a row of cos.
void rotary(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t. A failure of CUDA throws std::runtime_error.
// Of a position that is no row of cos the rotated dimensions become NaN.
void rotary(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& shape, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
