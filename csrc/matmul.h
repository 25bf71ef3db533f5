// Products of matrices, for layers whose rows are many.
//
//   c = a @ b + bias, or c += a @ b
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

// Element (r, c) lies at data[r * row_stride + c * col_stride]; one of the strides is 1.
template <class T>
struct MatrixView {
  T* data;
  int64_t rows, cols, row_stride, col_stride;
};

namespace cpu {
// a: (M, K). b: (K, N). c: (M, N), with contiguous rows. bias: (N), or null, as it is where c is added to.
// The same bits for any number of threads.
void matmul(const MatrixView<float>& a, const MatrixView<float>& b, const float* bias,
            const MatrixView<float>& c, bool accumulate, int threads);

// The same of bfloat16, with C float or bf16. Sums are in f32. Throws std::invalid_argument without AMX.
template <class C>
void matmul_bf16(const MatrixView<bf16>& a, const MatrixView<bf16>& b, const float* bias,
                 const MatrixView<C>& c, bool accumulate, int threads);
}  // namespace cpu

}  // namespace lspm
