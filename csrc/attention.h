// Scaled dot-product attention over heads, queries and keys; key heads may be fewer than query heads.
//
//   s = cap(q k^T * scale) - slope |i + shift - j| + bias + mask,  cap(s) = softcap tanh(s / softcap)
//   p = softmax(s), where a sink of the head adds exp(sink) to the denominator;  out = dropout(p) v
//
// Query i stands at key i + shift and sees `left` keys before it and `right` behind it. A query that sees no
// key gives 0, and no gradient. Element (i, j) is dropped where word j / 16 % 4 of Philox4x32-10 of the
// counter (j / 64 * 16 + j % 16, i, head, batch) under the key `seed` is below dropout * 2^32; others are
// divided by 1 - dropout.
#pragma once
#include <algorithm>
#include <cstdint>

#include "heads.h"

namespace lspm {

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys;  // heads is a multiple of kv_heads
  int64_t head_dim, value_dim;                    // 1 to 256
  DType dtype;                                    // of q, k, v, out and their gradients: f32, bf16 or f16
  int64_t left, right;                            // of the window; below 0: all
  int64_t shift;
  float scale, softcap;  // softcap 0: none
  double dropout;        // the share that is dropped, which is compared with 32 bits
  uint64_t seed;

  int64_t group() const { return heads / kv_heads; }  // query heads to a key head
  // Query i sees the keys [first_key(i), end_key(i)), none where that is empty. Both grow with i.
  int64_t first_key(int64_t query) const { return left < 0 ? 0 : std::max<int64_t>(0, query + shift - left); }
  int64_t end_key(int64_t query) const {
    return right < 0 ? keys : std::clamp<int64_t>(query + shift + right + 1, 0, keys);
  }
};

struct AttentionExtras {  // data: or null
  ScoresView bias, mask;  // of a mask with dtype b8, what is false is hidden
  ScoresView slopes;      // (batch, heads, 1, 1), f32
  const float* sinks;     // (heads), or null
};

namespace cpu {
// lse: (batch, heads, queries), the logarithm of each softmax's denominator; -inf where that is 0.
// statistics, or null where no backward follows: (2, batch, heads, queries), of each row the maximum and the
// inverse of the denominator under that, which is 0 where no key is seen.
void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const AttentionExtras& extras, const HeadsView& out, float* lse, float* statistics,
                       const AttentionShape& shape, int threads);

// dlse: (batch, heads, queries), or null. delta: the same size, an output: of each row the sum of p times its
// gradient, less dlse; the gradient of a sink follows from it. dbias: floats, zeros before the call, with
// strides of 0 where bias has them, but not over keys; data: or null.
void attention_backward(const HeadsView& dout, const float* dlse, const HeadsView& q, const HeadsView& k,
                        const HeadsView& v, const AttentionExtras& extras, const HeadsView& out,
                        const float* statistics, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, const ScoresView& dbias, float* delta,
                        const AttentionShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
