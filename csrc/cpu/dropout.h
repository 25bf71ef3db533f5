// What dropout leaves of vectors, and of rows that begin anywhere.
#pragma once
#include "../dropout.h"
#include "cpu/exact.h"
#include "cpu/pairs.h"
#include "cpu/philox.h"

namespace lspm::cpu {

// Drops as the loops take them.
struct Dropper {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  explicit Dropper(const Drops& drops) : seed(drops.seed), threshold(drops.threshold()), scale(drops.scale) {}

  F operator()(F v, U word) const { return word >= threshold ? unfused(v * scale) : F{}; }

  // What multiplies the elements [first, first + count) of all; 0: dropped. room: for count + kDrawn.
  const float* factors(int64_t first, int64_t count, float* room) const {
    const int64_t begin = first / kDrawn * kDrawn;
    const F kept = broadcast(scale);
    for_each_word(seed, 0, begin, first + count, [&](int64_t i, U word, auto lanes) {
      lanes.store(room + i - begin, word >= threshold ? kept : F{});
    });
    return room + first - begin;
  }
};

// v by such factors.
inline F dropped(F v, F factor) { return factor != 0 ? v * factor : F{}; }
inline Pair dropped(Pair v, Pair factor) {
  return {dropped(v.first, factor.first), dropped(v.second, factor.second)};
}

}  // namespace lspm::cpu
