// A C entry to the CUDA kernel of bpr: it returns what went wrong, or null.
#include "bpr.h"

#include "entry.h"

using lspm::BprShape;
using lspm::BprStep;

extern "C" {

const char* bpr_update(float* user_factors, float* item_factors, float* item_bias, const int32_t* users,
                       const int32_t* items, const int64_t* offsets, const int32_t* part_items,
                       const int64_t* part_offsets, const int64_t* seen_indptr, const int32_t* seen,
                       float* loss, int32_t* skipped, const BprShape* shape, const BprStep* step, int device,
                       void* stream) {
  return message_of([&] {
    lspm::cuda::bpr_update(user_factors, item_factors, item_bias,
                           {users, items, offsets, part_items, part_offsets, seen_indptr, seen}, loss,
                           skipped, *shape, *step, device, stream);
  });
}

// sizes: users, items, factors, pairs, grid, and the elements of part_items and seen.
BprShape* bpr_shape(const int64_t* n) {
  static BprShape shape;
  shape = {n[0], n[1], n[2], n[3], n[4], n[5], n[6]};
  return &shape;
}

BprStep* bpr_step(const float* x, int64_t seed) {
  static BprStep step;
  step = {x[0], x[1], x[2], x[3], seed};
  return &step;
}

}  // extern "C"
