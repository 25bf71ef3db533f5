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
#include "attention_shape.h"

namespace lspm {

struct AttentionExtras {  // data: or null
  ScoresView bias, mask;  // of a mask with dtype b8, what is false is hidden
  ScoresView slopes;      // (batch, heads, 1, 1), f32
  const float* sinks;     // (heads), or null
};

namespace cpu {
// lse: rows(), the logarithm of each softmax's denominator; -inf where that is 0. statistics, or null where
// no backward follows: (2, rows()), of each row the maximum and the inverse of the denominator under that,
// which is 0 where no key is seen.
void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const AttentionExtras& extras, const HeadsView& out, float* lse, float* statistics,
                       const AttentionShape& shape, int threads);

// dlse: rows(), or null. delta: (2, rows()), an output: of each row the sum of p times its gradient, less
// dlse, from which the gradient of a sink follows; and scratch. dbias: floats, zeros before the call, with
// strides of 0 where bias has them, but not over keys; data: or null.
void attention_backward(const HeadsView& dout, const float* dlse, const HeadsView& q, const HeadsView& k,
                        const HeadsView& v, const AttentionExtras& extras, const HeadsView& out,
                        const float* statistics, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, const ScoresView& dbias, float* delta,
                        const AttentionShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t; statistics is never null, dtype bf16 or f16,
// and there is no dbias. There are fewer than 2^30 queries and keys, and at most 65535 batches and heads. A
// failure of CUDA throws std::runtime_error.
//
// scratch: (splits, rows(), value_dim + 2); or null. With it, where queries * group() is at most 64 and there
// is neither bias, mask, slopes nor dropout, one block takes all queries of a group of heads and its keys are
// divided among `splits`: worth more than 1 where batch * kv_heads blocks would leave a GPU idle.
void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const AttentionExtras& extras, const HeadsView& out, float* lse, float* statistics,
                       float* scratch, int64_t splits, const AttentionShape& shape, int device, void* stream);
void attention_backward(const HeadsView& dout, const float* dlse, const HeadsView& q, const HeadsView& k,
                        const HeadsView& v, const AttentionExtras& extras, const HeadsView& out,
                        const float* statistics, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, float* delta, const AttentionShape& shape, int device,
                        void* stream);
}  // namespace cuda

}  // namespace lspm
