// Stochastic gradient descent on a factorisation of ratings, in place: one pass over them, one by one.
//
//   e = w (r - f(mean + bias_u + bias_i + <p_u, q_i>)),  f the identity, or of labels 0 to 1 the logistic
//   p_u += lr (e q_i - l2 p_u), q_i += lr (e p_u - l2 q_i), bias += lr (e - l2 bias), all from the old values
//
// then L1 draws p and q towards 0 and, where asked, what is negative becomes 0. The ratings lie by blocks of
// a Latin square: block s * grid + i has those of users of part i and of items of part (i + s) % grid, so
// that the blocks of one s share no row and run at once. The result is that of the ratings in their order.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct MfSgdShape {
  int64_t users, items, factors, ratings, grid;
  DType dtype;  // of the factors: f32, or bf16, which is rounded at random, so that small steps are not lost
};

struct MfSgdStep {
  float mean, lr, lr_bias;
  float l2_user, l2_item, l2_user_bias, l2_item_bias, l1_user, l1_item;
  bool nonnegative, logistic;
  int64_t seed;  // of what rounds at random
};

// In place: factors (users, factors) and (items, factors), biases or null, at lr_bias. user_squares and
// item_squares, or null, sum up each row's mean squared gradient, by whose root its lr is divided (Adagrad).
struct MfSgdTables {
  void *user_factors, *item_factors;
  float *user_bias, *item_bias, *user_squares, *item_squares;
};

// users, items, ratings, and weights or null: in the order of the blocks that begin at offsets (grid^2 + 1).
struct MfSgdRatings {
  const int32_t *users, *items;
  const float *ratings, *weights;
  const int64_t* offsets;
};

namespace cpu {
// loss: (grid^2), the sum over a block of w (r - f)^2, or of w times the cross-entropy, before each update.
// Returns the place of a rating whose ids are outside the tables, which nothing was done with, or -1.
int64_t mf_sgd_update(const MfSgdTables& tables, const MfSgdRatings& ratings, float* loss,
                      const MfSgdShape& shape, const MfSgdStep& step, int threads);
// Puts ratings, whose ids are below the sizes of the parts, into the order of the blocks.
void mf_sgd_blocks(const MfSgdRatings& from, const uint8_t* user_part, const uint8_t* item_part,
                   int32_t* users, int32_t* items, float* ratings, float* weights, int64_t* offsets,
                   int64_t n, int64_t grid, int threads);
}  // namespace cpu

namespace cuda {
// The same for at most 512 factors on GPU `device`, queued on `stream`, a cudaStream_t; nothing is done with
// a rating whose ids are outside the tables. A failure of CUDA throws std::runtime_error.
void mf_sgd_update(const MfSgdTables& tables, const MfSgdRatings& ratings, float* loss,
                   const MfSgdShape& shape, const MfSgdStep& step, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
