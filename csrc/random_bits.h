// Random bits as hashes of where they are used: nothing is stored, and every backend draws the same.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

LSPM_HOST_DEVICE inline uint64_t random_bits(int64_t seed, int64_t place) {
  uint64_t x = uint64_t(seed) + uint64_t(place) * 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 32) * 0xD6E8FEB86659FD93u;
  return (x ^ x >> 32) * 0xD6E8FEB86659FD93u;
}

// A number from 0 to n - 1, n below 2^32.
LSPM_HOST_DEVICE inline int64_t random_below(int64_t n, int64_t seed, int64_t place) {
  return int64_t((random_bits(seed, place) >> 32) * uint64_t(n) >> 32);
}

// 16 bits for a factor of either row of an update, from the 32 of the update and kBitsApart times the factor.
// U is a uint32_t or a vector of them.
constexpr uint32_t kBitsApart = 0x9E3779B9u;
template <class U>
struct RowBits {
  U user, item;
};
template <class U>
LSPM_HOST_DEVICE inline RowBits<U> row_bits(U x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  return {x >> 16, (x ^ x >> 16) & 0xffffu};
}

}  // namespace lspm
