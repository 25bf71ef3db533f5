// Activations of vectors, and their slopes.
#pragma once
#include <type_traits>

#include "activation.h"
#include "cpu/pairs.h"

namespace lspm {

// The error function: near 0 by a polynomial, elsewhere by exp() of one (both minimax, by N. Juffa).
// Within 1.1 ulp with fused multiply-add, 1.3 without.
inline F erf(F x) {
  const F size = x < 0.0f ? -x : x, square = x * x;
  F p = square * -5.96761703e-4f + 4.99119423e-3f;
  p = p * square - 2.67681349e-2f;
  p = p * square + 1.12819925e-1f;
  p = p * square - 3.76125336e-1f;
  p = p * square + 1.28379166e-1f;
  const F near = p * x + x;
  F q = size * -1.72853470e-5f + 3.83197126e-4f;
  q = q * square + (size * -3.88396438e-3f + 2.42546219e-2f);
  q = q * size - 1.06777877e-1f;
  q = q * size - 6.34846687e-1f;
  q = q * size - 1.28717512e-1f;
  const F far = 1.0f - exp(q * size - size);
  return size > 0.927734375f ? (x < 0.0f ? -far : far) : near;
}

inline F sigmoid(F z) { return 1.0f / (1.0f + exp(-max(broadcast(-100.0f), z))); }  // 0 from there on

template <Activation kActivation>
inline F activated(F z) {
  if constexpr (kActivation == Activation::relu) return z < 0.0f ? F{} : z;
  if constexpr (kActivation == Activation::relu6) return z < 0.0f ? F{} : z > 6.0f ? broadcast(6.0f) : z;
  if constexpr (kActivation == Activation::silu) return z * sigmoid(z);
  if constexpr (kActivation == Activation::gelu) return 0.5f * z * (1.0f + erf(z * 0.707106781f));
  return z;
}

// g times the activation's slope at z.
template <Activation kActivation>
inline F through(F g, F z) {
  if constexpr (kActivation == Activation::relu) return z <= 0.0f ? F{} : g;
  if constexpr (kActivation == Activation::relu6) return z <= 0.0f ? F{} : z >= 6.0f ? F{} : g;
  if constexpr (kActivation == Activation::silu) {
    const F s = sigmoid(z);
    return g * s * (1.0f + z * (1.0f - s));
  }
  if constexpr (kActivation == Activation::gelu)
    return g * (0.5f * (1.0f + erf(z * 0.707106781f)) + z * 0.398942280f * exp(z * z * -0.5f));
  return g;
}

template <Activation kActivation>
inline Pair activated(Pair z) {
  return {activated<kActivation>(z.first), activated<kActivation>(z.second)};
}
template <Activation kActivation>
inline Pair through(Pair g, Pair z) {
  return {through<kActivation>(g.first, z.first), through<kActivation>(g.second, z.second)};
}

// Calls f with the activation as a constant.
template <class Call>
void with_activation(Activation activation, Call f) {
  switch (activation) {
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return f(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
  }
}

}  // namespace lspm
