// exp and log of operations that IEEE 754 rounds in one way, so that every instruction set and every backend
// has the same bits: no product is added unrounded, as it else is where there is an instruction for that.
#pragma once
#include "cpu/simd.h"

namespace lspm::cpu {

using I = int32_t __attribute__((vector_size(sizeof(F))));

// v, of which the compiler knows no more: it fuses no product with the sum behind it, so that both round
// alike on every instruction set.
inline F unfused(F v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  asm("" : "+w"(v));
#endif
  return v;
}

// a * b, rounded before it is added to anything.
inline F times(F a, F b) { return unfused(a * b); }
inline F times(F a, float b) { return times(a, broadcast(b)); }

// The value of a polynomial whose next coefficients, the highest first, follow p.
template <class... Rest>
inline F polynomial(F p, F x, Rest... rest) {
  ((p = times(p, x) + rest), ...);
  return p;
}

// e ** x for x <= 0, and 0 where that is below 1.25 * 2 ** -40: exp() of simd.h, rounded at each step.
inline F exact_exp(F x) {
  const F near = max(broadcast(-30.0f), x);
  const F n = nearest(times(near, 1.44269504f));
  const F r = near - times(n, 0.693145752f) - times(n, 1.42860677e-6f);
  const F p = polynomial(times(r, 1.38368382e-3f) + 8.37482207e-3f, r, 4.16682260e-2f, 1.66664201e-1f,
                         4.99999921e-1f, 1.0f, 1.0f);
  return x < -27.5f ? F{} : times_power(p, n);
}

// -log(u) of a u from (0, 1) that a word makes, by Cephes' polynomial, which is within 2 ulp. v = 1 - u has
// 31 bits, so that those of small numbers are not fewer than those of large ones.
inline F exact_exponential(U word) {
  F v = times(__builtin_convertvector(reinterpret_cast<I>(word >> 1), F) + 0.5f, 0x1p-31f);
  v = v < 1 - 0x1p-24f ? v : broadcast(1 - 0x1p-24f);
  const I bits = reinterpret_cast<I>(1.0f - v) + 0x4AFB0D;  // 1.0 - sqrt(0.5), as bits
  const F n = __builtin_convertvector((bits >> 23) - 127, F);
  const F t = v < 0.25f ? -v : reinterpret_cast<F>((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
  const F p =
      polynomial(broadcast(7.0376836292e-2f), t, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  const F square = times(t, t);
  const F rest = times(times(p, t), square) - times(n, 2.12194440e-4f) - times(square, 0.5f);
  return -(t + rest + times(n, 0.693359375f));
}

}  // namespace lspm::cpu
