// Activations of vectors.
#pragma once
#include <limits>
#include <type_traits>

#include "activation.h"
#include "cpu/simd.h"

namespace lspm {

template <Activation kActivation>
F activate(F v) {
  if constexpr (kActivation == Activation::relu) return v < 0.0f ? F{} : v;  // a NaN stays one
  if constexpr (kActivation == Activation::relu6) return v < 0.0f ? F{} : v > 6.0f ? broadcast(6.0f) : v;
  if constexpr (kActivation == Activation::silu) {
    const F e = v < -87.0f ? broadcast(std::numeric_limits<float>::infinity()) : exp(-v);
    return v / (1.0f + e);
  }
  return v;
}

// Calls f(tag) with a tag whose `value` is the activation, as a constant.
template <class Call>
void with_activation(Activation activation, Call f) {
  switch (activation) {
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>());
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu6:
      return f(std::integral_constant<Activation, Activation::relu6>());
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>());
  }
}

}  // namespace lspm
