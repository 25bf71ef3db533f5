// Activations of vectors, and their slopes.
#pragma once
#include <type_traits>

#include "../activation.h"
#include "cpu/pairs.h"

namespace lspm {

// c[0] + c[1] x + c[2] x ** 2 + ..., by pairs, then pairs of pairs: few of the products wait for each other,
// and a processor that looks 100 instructions ahead computes that many more vectors at once (Estrin 1960).
template <class C, int kTerms>
__attribute__((always_inline)) inline F polynomial(F x, const C (&c)[kTerms]) {
  if constexpr (kTerms == 1) {
    return F{} + c[0];
  } else {
    F pairs[(kTerms + 1) / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kTerms / 2; ++i) pairs[i] = x * c[2 * i + 1] + c[2 * i];
    if constexpr (kTerms % 2) pairs[kTerms / 2] = F{} + c[kTerms - 1];
    if constexpr (kTerms <= 2)
      return pairs[0];
    else
      return polynomial(x * x, pairs);
  }
}

// 2 ** x for -252 < x < 254, by a minimax polynomial on |x - n| <= 1 / 2: of relative error 2e-9, or 2.8e-6
// where the result is to be rounded to a half type T.
template <class T>
__attribute__((always_inline)) inline F exp2(F x) {
  const F n = nearest(x), r = x - n;
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr float kTerms[] = {1.0f,           0.693147182f,   0.240226477f,  0.0555033237f,
                                0.00961843692f, 0.00133988739f, 0.00015353362f};
    return times_power(polynomial(r, kTerms), n);
  } else {
    constexpr float kTerms[] = {1.0f, 0.693124175f, 0.240240991f, 0.0559064262f, 0.00958285294f};
    return times_power(polynomial(r, kTerms), n);
  }
}

// The smooth activations are z * cdf(z), with the distribution function of a symmetric distribution: the
// normal one (gelu), the logistic one (silu) or one of a logistic cubic (gelu_tanh). All is computed at
// m = -|z|, where nothing cancels, and cdf(z) = 1 - cdf(m) for positive z. T is what the result is rounded
// to: for half types polynomials are shorter, which saves a fifth of gelu's time where memory allows it.

template <class T>
constexpr bool kIsFloat = sizeof(T) == sizeof(float);

// From there down the distribution function is 0, and its logarithm still within exp2's range.
template <Activation kActivation, class T>
constexpr float kZero = kActivation == Activation::silu   ? (kIsFloat<T> ? -100.0f : -130.0f)
                        : kActivation == Activation::gelu ? (kIsFloat<T> ? -11.0f : -13.0f)
                                                          : -12.0f;

// cdf(m) for kZero <= m <= 0. That of the normal distribution is 2 to the power of a minimax polynomial,
// which saves what erf needs: a second branch near 0 and the reduction of exp's argument. The error of z *
// cdf(z) is 1.2e-8, or 6e-7 for half types.
template <Activation kActivation, class T>
__attribute__((always_inline)) inline F tail(F m) {
  if constexpr (kActivation == Activation::silu) {
    if constexpr (kIsFloat<T>) return 1.0f / (1.0f + exp(-m));
    return 1.0f / (1.0f + exp2<T>(m * -1.44269504f));
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    return 1.0f / (1.0f + exp2<T>(m * (m * m * -0.102943240f - 2.30220820f)));
  } else if constexpr (kIsFloat<T>) {
    constexpr float kTerms[] = {-1.0f,          1.15110695f,     -0.459189028f,    0.0525623448f,
                                0.00716727832f, 0.000221173075f, -0.000149778862f, -3.14582321e-5f,
                                -2.15603177e-6f};
    return exp2<T>(polynomial(m, kTerms));
  } else {
    constexpr float kTerms[] = {-1.0f,         1.15104699f,   -0.459459871f,
                                0.0522813499f, 0.0072530983f, 0.000495731714f};
    return exp2<T>(polynomial(m, kTerms));
  }
}

// The density at m, whose distribution function there is t; the normal one as t times a polynomial.
template <Activation kActivation, class T>
__attribute__((always_inline)) inline F density(F m, F t) {
  if constexpr (kActivation == Activation::silu) {
    return t * (1.0f - t);
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    return t * (1.0f - t) * (m * m * 0.214064449f + 1.59576912f);
  } else if constexpr (kIsFloat<T>) {
    constexpr float kTerms[] = {0.797884643f,     -0.63661468f,    0.109049663f,
                                0.0192634929f,    1.54202007e-5f,  -0.0011313475f,
                                -0.000342816813f, -4.86608951e-5f, -2.84100474e-6f};
    return t * polynomial(m, kTerms);
  } else {
    constexpr float kTerms[] = {0.797865748f, -0.636851549f, 0.108864509f, 0.0201984812f, 0.00173531449f};
    return t * polynomial(m, kTerms);
  }
}

template <Activation kActivation, class T>
__attribute__((always_inline)) inline F below(F z) {  // m; NaN at NaN
  return max(broadcast(kZero<kActivation, T>), reinterpret_cast<F>(reinterpret_cast<U>(z) | 0x80000000u));
}

template <Activation kActivation, class T = float>
__attribute__((always_inline)) inline F activated(F z) {
  if constexpr (kActivation == Activation::none) return z;
  if constexpr (kActivation == Activation::relu) return z < 0.0f ? F{} : z;
  if constexpr (kActivation == Activation::relu6) return z < 0.0f ? F{} : z > 6.0f ? broadcast(6.0f) : z;
  if constexpr (kActivation >= Activation::silu) {
    const F t = tail<kActivation, T>(below<kActivation, T>(z));
    return z * (z < 0.0f ? t : 1.0f - t);
  }
}

// g times the activation's slope at z.
template <Activation kActivation, class T = float>
__attribute__((always_inline)) inline F through(F g, F z) {
  if constexpr (kActivation == Activation::none) return g;
  if constexpr (kActivation == Activation::relu) return z <= 0.0f ? F{} : g;
  if constexpr (kActivation == Activation::relu6) return z <= 0.0f ? F{} : z >= 6.0f ? F{} : g;
  if constexpr (kActivation >= Activation::silu) {
    const F m = below<kActivation, T>(z), t = tail<kActivation, T>(m);
    return g * (z * density<kActivation, T>(m, t) + (z < 0.0f ? t : 1.0f - t));
  }
}

template <Activation kActivation, class T = float>
__attribute__((always_inline)) inline Pair activated(Pair z) {
  return {activated<kActivation, T>(z.first), activated<kActivation, T>(z.second)};
}
template <Activation kActivation, class T = float>
__attribute__((always_inline)) inline Pair through(Pair g, Pair z) {
  return {through<kActivation, T>(g.first, z.first), through<kActivation, T>(g.second, z.second)};
}

// Calls f with the activation, one of kKnown, as a constant.
template <Activation... kKnown, class Call>
void with_one_of(Activation activation, Call f) {
  ((activation == kKnown ? f(std::integral_constant<Activation, kKnown>{}) : void()), ...);
}

// The same for those of an epilogue.
template <class Call>
void with_activation(Activation activation, Call f) {
  using A = Activation;
  with_one_of<A::none, A::relu, A::relu6, A::silu, A::gelu>(activation, f);
}

}  // namespace lspm
