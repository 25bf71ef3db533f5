// The square root of a vector.
#pragma once
#include <cmath>

#include "cpu/simd.h"

namespace lspm::cpu {

inline F sqrt(F v) {
  float lanes[kLanes];
  store(lanes, v);
  for (float& lane : lanes) lane = std::sqrt(lane);  // which compilers make one instruction
  return load(lanes);
}

}  // namespace lspm::cpu
