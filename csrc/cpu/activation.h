// Activations of vectors, and their slopes.
#pragma once
#include <type_traits>

#include "activation.h"
#include "cpu/pairs.h"

namespace lspm {

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
