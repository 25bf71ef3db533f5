// The ratings that a matrix factorisation predicts for pairs of a user and an item, and their gradient.
//
//   ratings[p] = mean + user_bias[u] + item_bias[i] + sum over d of user_factors[u, d] * item_factors[i, d]
//
// with u = users[p] and i = items[p]. The gradient of a table's row adds up its pairs in their order,
// whatever the number of threads; rows without a pair have gradient 0. Sums are in float.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct MfShape {
  int64_t pairs, users, items, dim;  // users and items fewer than 2 ** 31
  DType dtype;                       // of ratings, tables and their gradients: f32, bf16 or f16
};

// Both tables, as they are or their gradients: (users, dim), (items, dim), (users), (items). In the forward
// factors are there and a bias may be null; of the gradients any may be null, and is then not computed.
template <class Void>
struct MfTables {
  Void *user_factors, *item_factors, *user_bias, *item_bias;
};

namespace cpu {
// users, items, ratings: (pairs). An id that is none throws std::invalid_argument: no table is read at it.
void mf_forward(const MfTables<const void>& tables, const int64_t* users, const int64_t* items, float mean,
                void* ratings, const MfShape& shape, int threads);
void mf_backward(const void* dratings, const MfTables<const void>& tables, const int64_t* users,
                 const int64_t* items, const MfTables<void>& gradients, const MfShape& shape, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t. An id that is none makes its rating NaN, and
// the gradient of its pair's other row of factors. A failure of CUDA throws std::runtime_error.
void mf_forward(const MfTables<const void>& tables, const int64_t* users, const int64_t* items, float mean,
                void* ratings, const MfShape& shape, int device, void* stream);
// The gradients of one table, users' or items', whose ids do not descend; of both it throws
// std::invalid_argument.
void mf_backward(const void* dratings, const MfTables<const void>& tables, const int64_t* users,
                 const int64_t* items, const MfTables<void>& gradients, const MfShape& shape, int device,
                 void* stream);
}  // namespace cuda

}  // namespace lspm
