// A C entry to the CUDA kernels of top_k_scores: returns what went wrong, or null.
#include "top_k_scores.h"

#include "entry.h"

extern "C" const char* top_k_scores_forward(const void* queries, const void* items, const float* item_bias,
                                            const int64_t* indptr, const int64_t* excluded, int64_t count,
                                            int64_t* scratch, int64_t parts, float* scores, int64_t* indices,
                                            const lspm::TopKScoresShape* shape, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::top_k_scores_forward(queries, items, item_bias, {indptr, excluded, count}, scratch, parts,
                                     scores, indices, *shape, device, stream);
  });
}
