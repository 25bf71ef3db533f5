// C entries to the CUDA kernels of embedding_bag: each returns what went wrong, or null.
#include "embedding_bag.h"

#include "entry.h"

using lspm::DType;
using lspm::EmbeddingBagShape;

extern "C" {

const char* embedding_bag_forward(const void* weight, const void* indices, const void* offsets,
                                  const void* per_sample_weights, void* out, const EmbeddingBagShape* shape,
                                  int device, void* stream) {
  return message_of([&] {
    lspm::cuda::embedding_bag_forward(weight, {indices, offsets, per_sample_weights}, out, *shape, device,
                                      stream);
  });
}

const char* embedding_bag_backward(const void* dout, const void* weight, const void* indices,
                                   const void* offsets, const void* per_sample_weights, const int32_t* bag_of,
                                   const void* rows, const int64_t* order, float* shares, float* parts,
                                   void* dweight, void* dweights, const EmbeddingBagShape* shape, int device,
                                   void* stream) {
  return message_of([&] {
    lspm::cuda::embedding_bag_backward(dout, weight, {indices, offsets, per_sample_weights},
                                       {rows, order, bag_of, shares, parts}, dweight, dweights, *shape,
                                       device, stream);
  });
}

// sizes: rows, dim, bags, indices, padding_idx, offsets.
EmbeddingBagShape* embedding_bag_shape(const int64_t* n, int mean, int dtype, int index_dtype) {
  static EmbeddingBagShape shape;
  shape = {n[0], n[1], n[2], n[3], n[4], n[5], mean != 0, DType(dtype), DType(index_dtype)};
  return &shape;
}

}  // extern "C"
