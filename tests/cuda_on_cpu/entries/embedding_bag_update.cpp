// A C entry to the CUDA kernels of embedding_bag_update: returns what went wrong, or null.
#include "embedding_bag_update.h"

#include "entry.h"

using lspm::DType;
using lspm::EmbeddingBagShape;
using lspm::RowStep;

extern "C" {

const char* embedding_bag_update(void* weight, float* first, float* second, const void* dout,
                                 const void* indices, const void* offsets, const void* per_sample_weights,
                                 const int32_t* bag_of, const void* rows, const int64_t* order, float* shares,
                                 float* parts, const EmbeddingBagShape* shape, const RowStep* step,
                                 int device, void* stream) {
  return message_of([&] {
    lspm::cuda::embedding_bag_update(weight, first, second, dout, {indices, offsets, per_sample_weights},
                                     {rows, order, bag_of, shares, parts}, *shape, *step, device, stream);
  });
}

// sizes: rows, dim, bags, indices, padding_idx, offsets.
EmbeddingBagShape* embedding_bag_shape(const int64_t* n, int mean, int dtype, int index_dtype) {
  static EmbeddingBagShape shape;
  shape = {n[0], n[1], n[2], n[3], n[4], n[5], mean != 0, DType(dtype), DType(index_dtype)};
  return &shape;
}

// numbers: lr, eps, beta1, beta2, weight_decay. seed: below 0 there is none.
RowStep* embedding_bag_step(int optimizer, const double* numbers, int64_t step, int64_t seed) {
  static RowStep how;
  how = {lspm::RowOptimizer(optimizer),
         numbers[0],
         numbers[1],
         numbers[2],
         numbers[3],
         numbers[4],
         step,
         seed >= 0,
         seed < 0 ? 0 : uint64_t(seed)};
  return &how;
}

}  // extern "C"
