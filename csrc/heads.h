// Tensors with a batch and heads, wherever they lie: what attention reads and writes.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

// A tensor (batch, heads, rows, dim): where it begins and its strides in elements. The last stride is 1.
//
// starts, or null: (batch), the row at which each batch begins; packed sequences have a batch_stride of 0.
// pages, or null: (batch, page_columns), of which rows i page_rows to (i + 1) page_rows of a batch lie in
// page i; the tensor is then (pages, heads, page_rows, dim), and batch_stride leads from page to page. Beside
// starts page_columns is 1.
struct HeadsView {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
  const int32_t* starts = nullptr;
  const int32_t* pages = nullptr;
  int64_t page_rows = 0, page_columns = 0;

  template <class T>
  LSPM_HOST_DEVICE T* at(int64_t batch, int64_t head, int64_t row = 0) const {
    if (starts) row += starts[batch];
    if (pages) batch = pages[batch * page_columns + row / page_rows], row %= page_rows;
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }

  // How many of `rows` rows from `row` on lie row_stride apart.
  LSPM_HOST_DEVICE int64_t together(int64_t row, int64_t rows) const {
    const int64_t left = page_rows - (pages ? row % page_rows : 0);
    return pages && left < rows ? left : rows;
  }
};

// (batch, heads, queries, keys), strides in elements, 0 where the elements are the same. dtype: f32, bf16,
// f16 or b8.
struct ScoresView {
  const void* data;
  int64_t batch_stride, head_stride, row_stride, key_stride;
  DType dtype;

  // How many different batches, heads, rows or keys there are.
  static int64_t distinct(int64_t stride, int64_t size) { return stride ? size : 1; }
};

}  // namespace lspm
