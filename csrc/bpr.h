// Bayesian personalised ranking, in place: one pass over pairs of user and item, each against another item.
//
//   x = bias_i - bias_j + <p_u, q_i - q_j>,  g = 1 / (1 + exp(x)),  j drawn from the items of i's part
//   p_u += lr (g (q_i - q_j) - l2 p_u), q_i += lr (g p_u - l2 q_i), q_j += lr (-g p_u - l2 q_j), biases alike
//
// The pairs lie by blocks of a Latin square, as mf_sgd.h says of ratings. As j is of i's part, the blocks of
// one step share no row here either.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

constexpr int64_t kBprDraws = 8;  // of an item that the user has not seen, before a pair is skipped

struct BprShape {
  int64_t users, items, factors, pairs, grid;
  int64_t placed, seen;  // the elements of part_items and of seen
};

struct BprStep {
  float lr, l2_user, l2_item, l2_bias;
  int64_t seed;
};

// users and items (pairs) in the order of the blocks, which begin at offsets (grid^2 + 1). part_items
// (items): the items by parts, which begin at part_offsets (grid + 1). seen: for each user the items that are
// never j, from seen_indptr[u] on, ascending; or null.
struct BprPairs {
  const int32_t *users, *items;
  const int64_t* offsets;
  const int32_t* part_items;
  const int64_t *part_offsets, *seen_indptr;
  const int32_t* seen;
};

namespace cpu {
// Float32 factors and bias, or null. loss: (grid^2), the sum over a block of log(1 + exp(-x)) before each
// update; skipped: (grid^2), how many pairs found no j, and changed nothing. Returns the place of a pair
// whose ids are outside the tables, which nothing was done with, or -1.
int64_t bpr_update(float* user_factors, float* item_factors, float* item_bias, const BprPairs& pairs,
                   float* loss, int32_t* skipped, const BprShape& shape, const BprStep& step, int threads);
}  // namespace cpu

namespace cuda {
// The same for at most 512 factors on GPU `device`, queued on `stream`, a cudaStream_t; nothing is done with
// a pair whose ids are outside the tables. A failure of CUDA throws std::runtime_error.
void bpr_update(float* user_factors, float* item_factors, float* item_bias, const BprPairs& pairs,
                float* loss, int32_t* skipped, const BprShape& shape, const BprStep& step, int device,
                void* stream);
}  // namespace cuda

}  // namespace lspm
