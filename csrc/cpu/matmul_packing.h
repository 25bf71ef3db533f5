// What matmul.cpp and matmul_bf16.cpp have in common; the latter includes gemm_bf16.h before.
#pragma once
#include "cpu/gemm.h"
#include "matmul.h"

namespace lspm::cpu {

template <class T>
bool is_transposed(const MatrixView<T>& x) {
  return x.cols > 1 && x.col_stride != 1;
}

// Rows [d, d + depth) and columns [n, n + columns) of b as a right side.
template <class T>
void pack_right(const MatrixView<T>& b, int64_t d, int64_t depth, int64_t n, int64_t columns, T* right) {
  const int64_t panel = panel_size(depth);
  if (is_transposed(b))
    pack_right_transposed(b.data + n * b.col_stride + d, b.col_stride, right, panel, depth, columns);
  else
    pack_right(b.data + d * b.row_stride + n, b.row_stride, right, panel, depth, columns);
}

}  // namespace lspm::cpu
