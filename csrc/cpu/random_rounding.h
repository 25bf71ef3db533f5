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

// Calls body(i, word, lanes) for each vector of the elements [begin, end) of a row; begin is a multiple
// of 64. Element i takes word i / 16 % 4 of the counter c = i / 64 * 16 + i % 16, which is (c, row, c >> 32).
template <class Body>
void for_each_word(uint64_t seed, int64_t row, int64_t begin, int64_t end, Body body) {
  constexpr int kBlock = 16;  // words of four kinds that one counter gives, each for so many elements
  const auto lane = [](int from) {
    U u;
    for (int i = 0; i < kLanes; ++i) u[i] = uint32_t(from + i);
    return u;
  };
  for (int64_t d = begin; d < end; d += 4 * kBlock)
    for (int from = 0; from < kBlock; from += kLanes) {
      const U counter = lane(from) + uint32_t(d / 4), zero = counter - counter;
      U x[4] = {counter, zero + uint32_t(row), zero + uint32_t(uint64_t(row) >> 32),
                zero + uint32_t(uint64_t(d / 4) >> 32)};
      philox(seed, x);
      for (int k = 0; k < 4; ++k) {
        const int64_t at = d + k * kBlock + from;
        if (at + kLanes <= end)
          body(at, x[k], AllLanes{});
        else if (at < end)
          body(at, x[k], FirstLanes{int(end - at)});
      }
    }
}

}  // namespace lspm::cpu
