// Dropout, with the residual addition that stands behind it where wanted.
//
//   out[i] = residual[i] + (x[i] * scale where element i is kept, 0 where it is dropped)
//
// Element i, by its place in memory, is kept where word i / 16 % 4 of Philox4x32-10 of the counter
// (c, 0, 0, c >> 32), c = i / 64 * 16 + i % 16, under `seed` is not below p * 2 ** 32: nothing is stored, and
// every backend and number of threads drops the same. The gradient of x is dropout of that of out. scale is
// 1 / (1 - p), or what a gradient takes that is multiplied by it elsewhere.
#pragma once
#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct Drops {
  double p;  // the share that is dropped, from 0 to 1
  float scale;
  uint64_t seed;

  uint32_t threshold() const { return uint32_t(std::min(p * 4294967296.0, 4294967295.0)); }
};

namespace cpu {
// x, residual, out: `elements`, contiguous; residual may be null, and out may be either.
void dropout_forward(const void* x, const void* residual, void* out, int64_t elements, DType dtype,
                     const Drops& drops, int threads);
}  // namespace cpu

}  // namespace lspm
