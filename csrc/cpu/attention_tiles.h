// What the forward and the backward of attention have in common: their tiles.
#pragma once
#include "cpu/gemm.h"
#include "cpu/gemm_bf16.h"
#include "cpu/parallel.h"
#include "cpu/scores.h"

namespace lspm::cpu {

constexpr int64_t kKeys = 256;  // keys in a tile: many, which spares passes over queries and sums
constexpr int64_t kMaxDim = kMaxDepth;
constexpr int64_t kScores = kStride<float>;  // elements from row to row of all that is float in scratch
constexpr int64_t kSkip = 64;  // what a window hides at the begin of a tile is left out in such steps

// Whether q is multiplied by the scale as it is packed; bf16 would round it again, so there the scores are.
template <class O>
constexpr bool kScalesQueries = std::is_same_v<O, float>;

// The first column of a tile of keys from `key` on that a product for the queries from `query` on needs.
inline int64_t first_column(const AttentionShape& s, int64_t query, int64_t key) {
  return std::max<int64_t>(0, s.first_key(query) - key) / kSkip * kSkip;
}

}  // namespace lspm::cpu
