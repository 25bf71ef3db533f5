// bfloat16 rounded up or down at random, with the exact value as the mean: steps smaller than half of that
// between two values are else lost.
#pragma once
#include "cpu/philox.h"

namespace lspm::cpu {

// The bfloat16 above or below each lane, by the high half of a word; what is not finite is as always.
inline F rounded_at_random(F v, U word) {
  const U bits = reinterpret_cast<U>(v), moved = (bits + (word >> 16)) & 0xffff0000u;
  return (bits & 0x7f800000u) == 0x7f800000u ? v : reinterpret_cast<F>(moved);
}

}  // namespace lspm::cpu
