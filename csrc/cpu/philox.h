// Random bits as a function of where they are used (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011): nothing is stored, and the backward finds again what the forward drew.
#pragma once
#include "cpu/simd.h"

namespace lspm::cpu {

// Philox4x32-10 of the counters (x[0], x[1], x[2], x[3]) of each lane, in place.
inline void philox(uint64_t seed, U (&x)[4]) {
  uint32_t first = uint32_t(seed), second = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, first += 0x9E3779B9u, second += 0xBB67AE85u) {
    U high[2], low[2];
    multiply_wide(x[0], 0xD2511F53u, high[0], low[0]);
    multiply_wide(x[2], 0xCD9E8D57u, high[1], low[1]);
    x[0] = high[1] ^ x[1] ^ first;
    x[1] = low[1];
    x[2] = high[0] ^ x[3] ^ second;
    x[3] = low[0];
  }
}

}  // namespace lspm::cpu
