// Tensors with a batch and heads, wherever they lie: what attention reads and writes.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

// A tensor (batch, heads, rows, dim): where it begins and its strides in elements. The last stride is 1.
struct HeadsView {
  void* data;
  int64_t batch_stride, head_stride, row_stride;

  template <class T>
  T* at(int64_t batch, int64_t head, int64_t row = 0) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
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
