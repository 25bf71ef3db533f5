// Products of float32 matrices, for layers whose rows are many.
//
//   c = a @ b + bias, or c += a @ b
#pragma once
#include <cstdint>

namespace lspm {

// Element (r, c) lies at data[r * row_stride + c * col_stride]; one of the strides is 1.
struct MatrixView {
  float* data;
  int64_t rows, cols, row_stride, col_stride;
};

namespace cpu {
// a: (M, K). b: (K, N). c: (M, N), with contiguous rows. bias: (N), or null, as it is where c is added to.
// The same bits for any number of threads.
void matmul(const MatrixView& a, const MatrixView& b, const float* bias, const MatrixView& c, bool accumulate,
            int threads);
}  // namespace cpu

}  // namespace lspm
