// A C entry to the CUDA kernel of mf_sgd: it returns what went wrong, or null.
#include "mf_sgd.h"

#include "entry.h"

using lspm::MfSgdShape;
using lspm::MfSgdStep;

extern "C" {

const char* mf_sgd_update(void* user_factors, void* item_factors, float* user_bias, float* item_bias,
                          float* user_squares, float* item_squares, const int32_t* users,
                          const int32_t* items, const float* ratings, const float* weights,
                          const int64_t* offsets, float* loss, const MfSgdShape* shape, const MfSgdStep* step,
                          int device, void* stream) {
  return message_of([&] {
    lspm::cuda::mf_sgd_update({user_factors, item_factors, user_bias, item_bias, user_squares, item_squares},
                              {users, items, ratings, weights, offsets}, loss, *shape, *step, device, stream);
  });
}

// sizes: users, items, factors, ratings, grid.
MfSgdShape* mf_sgd_shape(const int64_t* n, int dtype) {
  static MfSgdShape shape;
  shape = {n[0], n[1], n[2], n[3], n[4], static_cast<lspm::DType>(dtype)};
  return &shape;
}

MfSgdStep* mf_sgd_step(const float* x, int nonnegative, int logistic, int64_t seed) {
  static MfSgdStep step;
  step = {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], nonnegative != 0, logistic != 0, seed};
  return &step;
}

}  // extern "C"
