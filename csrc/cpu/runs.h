// Parameters of columns beside pairs of T, and their gradients: sums over rows, as runs of consecutive rows
// left them.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/pairs.h"
#include "cpu/parallel.h"

namespace lspm::cpu {

// Weights as floats, in the order in which pairs of T lie; null where there are none.
template <class T, class W>
const float* ordered(const W* weights, int64_t cols, float* room) {
  if constexpr (std::is_same_v<W, float> && !PairLanes<T>::kApart) return weights;
  if (!weights) return nullptr;
  for_each_pair<T>(0, cols,
                   [&](int64_t i, auto lanes) { lanes.store(room + i, lanes.load_ordered(weights + i)); });
  return room;
}

// total[i], or null, = the sum of first[p * stride + i] over p < runs in order, with the rounding errors
// carried along (Knuth's two-sum): as many terms as there are runs would otherwise cost a digit. The runs lie
// in the order of pairs of T.
template <class T, class W>
void add_runs(const float* first, int64_t runs, int64_t stride, W* total, int64_t cols, int threads) {
  if (!total) return;
  constexpr int64_t kUnit = 2 * kLanes;
  parallel_for((cols + kUnit - 1) / kUnit, runs * cols, threads, [&](int64_t begin, int64_t end) {
    for_each_pair<T>(begin * kUnit, std::min(end * kUnit, cols), [&](int64_t i, auto lanes) {
      decltype(lanes.load(first)) v{}, lost{};
      for (int64_t p = 0; p < runs; ++p) {
        const auto term = lanes.load(first + p * stride + i), next = v + term, seen = next - v;
        lost += (v - (next - seen)) + (term - seen);
        v = next;
      }
      lanes.store_ordered(total + i, v + lost);
    });
  });
}

}  // namespace lspm::cpu
