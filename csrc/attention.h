// Scaled dot-product attention over heads, queries and keys; key heads may be fewer than query heads.
//
//   p = softmax(q k^T * scale), out = p v
//
// The last query sees the last key where attention is causal: query i sees keys [0, i + keys - queries].
// A query that sees no key gives 0, and no gradient.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys;  // heads is a multiple of kv_heads
  int64_t head_dim, value_dim;                    // 1 to 256
  DType dtype;                                    // of q, k, v, out and their gradients: f32, bf16 or f16
  float scale;
  bool causal;

  int64_t group() const { return heads / kv_heads; }  // query heads to a key head
  // Query i sees the keys [0, visible_keys(i)).
  int64_t visible_keys(int64_t query) const {
    if (!causal) return keys;
    const int64_t last = query + keys - queries;
    return last < 0 ? 0 : last + 1 < keys ? last + 1 : keys;
  }
};

// A tensor (batch, heads, rows, dim): where it begins and its strides in elements. The last stride is 1.
struct HeadsView {
  void* data;
  int64_t batch_stride, head_stride, row_stride;

  template <class T>
  T* at(int64_t batch, int64_t head, int64_t row = 0) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

namespace cpu {
// lse: (batch, heads, queries), the logarithm of each softmax's denominator; -inf where a query sees no key.
void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                       float* lse, const AttentionShape& shape, int threads);

// delta: (batch, heads, queries), scratch: the dot product of each row of dout with that of out.
void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                        const HeadsView& out, const float* lse, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, float* delta, const AttentionShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
