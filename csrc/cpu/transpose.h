// Elements that change places between vectors.
#pragma once
#include "cpu/lanes.h"

namespace lspm {

// Turns kLanes rows of kLanes 32-bit elements into columns.
template <int kHalf = kLanes / 2>
inline void transpose(F (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const F a = rows[i], b = rows[i + kHalf];
    rows[i] = shuffle(a, b, kExchangedLow<kHalf>);
    rows[i + kHalf] = shuffle(a, b, kExchangedHigh<kHalf>);
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(rows);
}

// Lane i of the result is the sum of v[i]: as transpose(), but what meets in a lane is added.
template <int kHalf = kLanes / 2>
inline F sums_of(F (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i)
    v[i] = shuffle(v[i], v[i + kHalf], kExchangedLow<kHalf>) +
           shuffle(v[i], v[i + kHalf], kExchangedHigh<kHalf>);
  if constexpr (kHalf > 1) return sums_of<kHalf / 2>(v);
  return v[0];
}

}  // namespace lspm
