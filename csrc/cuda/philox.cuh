// Random bits as a function of where they are used (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011), as ../cpu/philox.h draws them.
#pragma once
#include "common.cuh"

namespace lspm::cuda {

// Philox4x32-10 of the counters (x[0], x[1], x[2], x[3]), in place.
__device__ __forceinline__ void philox(uint64_t seed, uint32_t (&x)[4]) {
  uint32_t first = uint32_t(seed), second = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(x[0]) * 0xD2511F53u, b = uint64_t(x[2]) * 0xCD9E8D57u;
    x[0] = uint32_t(b >> 32) ^ x[1] ^ first;
    x[1] = uint32_t(b);
    x[2] = uint32_t(a >> 32) ^ x[3] ^ second;
    x[3] = uint32_t(a);
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
}

}  // namespace lspm::cuda
