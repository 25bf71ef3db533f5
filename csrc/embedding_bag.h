// Sums of the rows of a table, by bags of indices.
//
//   out[b, d] = sum over p in bag b of s[p] * weight[indices[p], d]
//
// s[p] is per_sample_weights[p], 1 without them, and with `mean` 1 / n of the n indices of the bag. An index
// that is padding_idx is no part of its bag. An empty bag gives 0.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct EmbeddingBagShape {
  int64_t rows, dim, bags, indices;
  int64_t padding_idx;  // below 0: none
  int64_t offsets;      // how many: bags, bags + 1, or 0, where bags are equally long
  bool mean;
  DType dtype;        // weight, per_sample_weights, out and their gradients: f32, bf16 or f16
  DType index_dtype;  // indices and offsets: i32 or i64
};

// What says which rows are in which bag. offsets[b] is where bag b begins in indices; it ends where the next
// one begins or, the last, at the end.
struct Bags {
  const void *indices, *offsets, *per_sample_weights;  // the last two may be null
};

namespace cpu {
// weight: (rows, dim). out: (bags, dim). All of these, before anything is written, throw
// std::invalid_argument where an index lies outside the table or the offsets are none.
void embedding_bag_forward(const void* weight, const Bags& bags, void* out, const EmbeddingBagShape& shape,
                           int threads);
// dweight: (rows, dim) or null. dweights: (indices), the gradient of per_sample_weights, or null; only this
// reads weight.
void embedding_bag_backward(const void* dout, const void* weight, const Bags& bags, void* dweight,
                            void* dweights, const EmbeddingBagShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
