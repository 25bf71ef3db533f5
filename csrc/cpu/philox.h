// Random bits as a function of where they are used (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011): nothing is stored, and the backward finds again what the forward drew.
#pragma once
#include <type_traits>

#include "cpu/lanes.h"

namespace lspm::cpu {

// Philox4x32-10 of the counters (x[0], x[1], x[2], x[3]) of each lane, in place; of kCount such at once, as a
// round waits for the products of the one before.
template <int kCount>
__attribute__((always_inline)) inline void philox(uint64_t seed, U (&x)[kCount][4]) {
  uint32_t first = uint32_t(seed), second = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, first += 0x9E3779B9u, second += 0xBB67AE85u)
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      U high[2], low[2];
      multiply_wide(x[n][0], 0xD2511F53u, high[0], low[0]);
      multiply_wide(x[n][2], 0xCD9E8D57u, high[1], low[1]);
      x[n][0] = high[1] ^ x[n][1] ^ first;
      x[n][1] = low[1];
      x[n][2] = high[0] ^ x[n][3] ^ second;
      x[n][3] = low[0];
    }
}
inline void philox(uint64_t seed, U (&x)[4]) { philox(seed, reinterpret_cast<U(&)[1][4]>(x)); }

constexpr int64_t kDrawn = 64;                   // elements that share counters
constexpr int kTogether = kLanes == 16 ? 4 : 1;  // such blocks drawn at once: as many as registers hold

// The words of kBlocks * kDrawn elements of a row from `first` on, a multiple of kDrawn, in their order.
// Element i takes word i / 16 % 4 of the counter c = i / 64 * 16 + i % 16, which is (c, row, row >> 32, c >>
// 32).
template <int kBlocks>
__attribute__((always_inline)) inline void draw(uint64_t seed, int64_t row, int64_t first,
                                                U (&words)[kBlocks * kDrawn / kLanes]) {
  constexpr int kVectors = 16 / kLanes;  // whose words are of one kind
  const auto lane = [](int from) {
    U u;
    for (int i = 0; i < kLanes; ++i) u[i] = uint32_t(from + i);
    return u;
  };
  U x[kBlocks * kVectors][4];
  for (int n = 0; n < kBlocks * kVectors; ++n) {
    const int64_t c = first / 4 + n / kVectors * 16;
    const U counter = lane(n % kVectors * kLanes) + uint32_t(c), zero = counter - counter;
    x[n][0] = counter;
    x[n][1] = zero + uint32_t(row);
    x[n][2] = zero + uint32_t(uint64_t(row) >> 32);
    x[n][3] = zero + uint32_t(uint64_t(c) >> 32);
  }
  philox(seed, x);
  for (int n = 0; n < kBlocks * kVectors; ++n)
    for (int k = 0; k < 4; ++k) words[(n / kVectors * 4 + k) * kVectors + n % kVectors] = x[n][k];
}

// Calls body(i, word, lanes) for each vector of the elements [begin, end) of a row; begin is a multiple
// of kDrawn.
template <class Body>
void for_each_word(uint64_t seed, int64_t row, int64_t begin, int64_t end, Body body) {
  int64_t d = begin;
  const auto take = [&](auto blocks) {
    constexpr int kVectors = decltype(blocks)::value * kDrawn / kLanes;
    U words[kVectors];
    draw<decltype(blocks)::value>(seed, row, d, words);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = d + v * kLanes;
      if (at + kLanes <= end)
        body(at, words[v], AllLanes{});
      else if (at < end)
        body(at, words[v], FirstLanes{int(end - at)});
    }
    d += kVectors * kLanes;
  };
  while (d + kTogether * kDrawn <= end) take(std::integral_constant<int, kTogether>{});
  while (d < end) take(std::integral_constant<int, 1>{});
}

}  // namespace lspm::cpu
