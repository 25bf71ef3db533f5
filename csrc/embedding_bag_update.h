// The gradient of an embedding bag's table and an optimizer's step with it, in place and row by row: no
// gradient is ever stored. A row that stands in bags changes once; one that stands in none, not at all.
//
//   g = sum over p with indices[p] = row of s[p] * dout[bag of p] + weight_decay * weight[row]
//   sgd:      weight[row] -= lr * g
//   adagrad:  first[row] += mean(g ** 2);  weight[row] -= lr * g / (sqrt(first[row]) + eps)
//   adam:     first[row] += (1 - beta1) * (g - first[row])
//             second[row] += (1 - beta2) * (g ** 2 - second[row])
//             weight[row] -= lr / (1 - beta1 ** step) * first[row]
//                            / (sqrt(second[row] / (1 - beta2 ** step)) + eps)
#pragma once
#include <cstdint>

#include "embedding_bag.h"

namespace lspm {

enum class RowOptimizer : int { sgd = 0, adagrad = 1, adam = 2 };

struct RowStep {
  RowOptimizer optimizer;
  double lr, eps, beta1, beta2, weight_decay;
  int64_t step;  // from 1 on
  // bf16 alone: rounds up as often as the part that is lost is of the step between two values. Element d of a
  // row takes word d / 16 % 4 of the counter (d / 64 * 16 + d % 16, row) of Philox4x32-10; its high half is
  // not below the part lost where it rounds down.
  bool stochastic;
  uint64_t seed;
};

namespace cpu {
// weight: (rows, dim). first: (rows) of adagrad, (rows, dim) of adam. second: (rows, dim) of adam. Both are
// float32. dout: (bags, dim).
void embedding_bag_update(void* weight, float* first, float* second, const void* dout, const Bags& bags,
                          const EmbeddingBagShape& shape, const RowStep& step, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t, unchecked: an index that is none changes no
// row. A failure of CUDA throws std::runtime_error.
void embedding_bag_update(void* weight, float* first, float* second, const void* dout, const Bags& bags,
                          const SortedPlaces& sorted, const EmbeddingBagShape& shape, const RowStep& step,
                          int device, void* stream);
}  // namespace cuda

}  // namespace lspm
