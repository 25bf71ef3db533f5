// The k items that score best for each query, without the matrix of all scores.
//
//   score[b, n] = sum over d of queries[b, d] * items[n, d] + item_bias[n], summed in float
//
// Of a query's items, without those it excludes, the first k in this order: the larger score first, a NaN
// before every number, and of equal scores the smaller index first. Where fewer are left, the rest of the
// row is -inf with index -1. A score's bits depend on nothing but its query, its item and its bias.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct TopKScoresShape {
  int64_t queries, items, dim, k;     // fewer than 2 ** 32 items
  int64_t query_stride, item_stride;  // elements from row to row
  DType dtype;                        // of queries and items: f32, bf16 or f16
};

// Of query b: indices[indptr[b]] to indices[indptr[b + 1] - 1], in any order, the same one as often as may
// be.
struct Exclusions {
  const int64_t *indptr, *indices;  // (queries + 1), or null; (count)
  int64_t count;
};

namespace cpu {
// queries: (queries, dim). items: (items, dim). item_bias: (items), or null. scores, indices: (queries, k).
// Exclusions that are none throw std::invalid_argument before anything is written.
void top_k_scores_forward(const void* queries, const void* items, const float* item_bias,
                          const Exclusions& exclusions, float* scores, int64_t* indices,
                          const TopKScoresShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// The same for k of at most 512 on GPU `device`, queued on `stream`, a cudaStream_t. Each query's exclusions
// are in order; one that is none excludes nothing. parts: among how many the items are divided, from 1 on;
// scratch: (parts, queries, k) where that is more than 1. A failure of CUDA throws std::runtime_error.
void top_k_scores_forward(const void* queries, const void* items, const float* item_bias,
                          const Exclusions& exclusions, int64_t* scratch, int64_t parts, float* scores,
                          int64_t* indices, const TopKScoresShape& shape, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
