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

constexpr int64_t kDrawn = 64;  // elements whose words are drawn together

// The words of kDrawn elements of a row from `first` on, a multiple of kDrawn, in their order. Element i
// takes word i / 16 % 4 of the counter c = i / 64 * 16 + i % 16, which is (c, row, row >> 32, c >> 32).
inline void draw(uint64_t seed, int64_t row, int64_t first, U (&words)[kDrawn / kLanes]) {
  constexpr int kVectors = 16 / kLanes;  // whose words are of one kind
  const auto lane = [](int from) {
    U u;
    for (int i = 0; i < kLanes; ++i) u[i] = uint32_t(from + i);
    return u;
  };
  for (int part = 0; part < kVectors; ++part) {
    const U counter = lane(part * kLanes) + uint32_t(first / 4), zero = counter - counter;
    U x[4] = {counter, zero + uint32_t(row), zero + uint32_t(uint64_t(row) >> 32),
              zero + uint32_t(uint64_t(first / 4) >> 32)};
    philox(seed, x);
    for (int k = 0; k < 4; ++k) words[k * kVectors + part] = x[k];
  }
}

// Calls body(i, word, lanes) for each vector of the elements [begin, end) of a row; begin is a multiple
// of kDrawn.
template <class Body>
void for_each_word(uint64_t seed, int64_t row, int64_t begin, int64_t end, Body body) {
  for (int64_t d = begin; d < end; d += kDrawn) {
    U words[kDrawn / kLanes];
    draw(seed, row, d, words);
    for (int v = 0; v < kDrawn / kLanes; ++v) {
      const int64_t at = d + v * kLanes;
      if (at + kLanes <= end)
        body(at, words[v], AllLanes{});
      else if (at < end)
        body(at, words[v], FirstLanes{int(end - at)});
    }
  }
}

}  // namespace lspm::cpu
