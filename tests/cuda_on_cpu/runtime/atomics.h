// Atomics of the CUDA language. Blocks run one after another, so they only need the checker to know of them.
#pragma once

#define EMU_ATOMIC(name, expression)                                                                        \
  template <class T>                                                                                        \
  T name(T* pointer, std::common_type_t<T> value, emu::Site at = emu::Site::here()) {                       \
    auto model = [](uint64_t old_bits, uint64_t operand_bits, uint64_t) {                                   \
      [[maybe_unused]] const T old = emu::from_bits<T>(old_bits);                                           \
      const T operand = emu::from_bits<T>(operand_bits);                                                    \
      return emu::to_bits<T>(expression);                                                                   \
    };                                                                                                      \
    return emu::from_bits<T>(emu::atomic_update(pointer, sizeof(T), model, emu::to_bits<T>(value), 0, at)); \
  }
EMU_ATOMIC(atomicAdd, T(old + operand))
EMU_ATOMIC(atomicSub, T(old - operand))
EMU_ATOMIC(atomicExch, operand)
EMU_ATOMIC(atomicMax, old > operand ? old : operand)
EMU_ATOMIC(atomicMin, old < operand ? old : operand)
EMU_ATOMIC(atomicOr, T(old | operand))
EMU_ATOMIC(atomicAnd, T(old& operand))
EMU_ATOMIC(atomicXor, T(old ^ operand))
template <class T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value,
            emu::Site at = emu::Site::here()) {
  auto model = [](uint64_t old, uint64_t expected, uint64_t value) { return old == expected ? value : old; };
  return emu::from_bits<T>(
      emu::atomic_update(pointer, sizeof(T), model, emu::to_bits<T>(expected), emu::to_bits<T>(value), at));
}
