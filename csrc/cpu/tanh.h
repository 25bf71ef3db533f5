// The hyperbolic tangent of vectors, for scores that are capped.
#pragma once
#include "cpu/simd.h"

namespace lspm {

// The hyperbolic tangent, within 2 ulp: near 0 by a polynomial (Moshier's Cephes), elsewhere by exp().
inline F tanh(F x) {
  const F square = x * x;
  F p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const F near = p * square * x + x;
  const F size = x < 0.0f ? -x : x;
  const F capped = size > 10.0f ? broadcast(10.0f) : size;  // from 9.02 on it is 1, and its slope 0
  const F far = 1.0f - 2.0f / (exp(capped + capped) + 1.0f);
  return size < 0.625f ? near : x < 0.0f ? -far : x != x ? x : far;
}

}  // namespace lspm
