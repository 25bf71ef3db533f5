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
  int64_t rows, dim, bags, indices, padding_idx;  // the last, below 0: none
  int64_t offsets;  // how many: bags, bags + 1, or 0, where bags are equally long
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
// dweight: (rows, dim) or null. dweights: (indices), of per_sample_weights, or null; only this reads weight.
void embedding_bag_backward(const void* dout, const void* weight, const Bags& bags, void* dweight,
                            void* dweights, const EmbeddingBagShape& shape, int threads);
}  // namespace cpu

// Places in the order of the table's rows, and what kernels of a GPU leave between each other.
struct SortedPlaces {
  const void* rows;       // indices, sorted stably: not descending
  const int64_t* order;   // where each of them stands in indices
  const int32_t* bag_of;  // the bag of each place in indices, or -1
  float* shares;          // (bags): with `mean` what a bag's gradient is multiplied by
  float* parts;           // (2, dim) for each kSortedChunk sorted places that have begun
};
constexpr int64_t kSortedChunk = 32;

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t, unchecked: an index that is none makes its
// bag and its weight's gradient NaN and adds to no row's; offsets that are none make their bag NaN. A failure
// of CUDA throws std::runtime_error.
void embedding_bag_forward(const void* weight, const Bags& bags, void* out, const EmbeddingBagShape& shape,
                           int device, void* stream);
// dweight is written where a row stands in a bag; all else is 0 beforehand. dweights reads bag_of alone.
void embedding_bag_backward(const void* dout, const void* weight, const Bags& bags,
                            const SortedPlaces& sorted, void* dweight, void* dweights,
                            const EmbeddingBagShape& shape, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
