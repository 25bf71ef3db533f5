// What the C++ that ptx2cpp makes of PTX is written in: registers, arithmetic, warp operations.
#pragma once
#include <algorithm>
#include <limits>

#include "ptx.cuh"

// Where an instruction stands: the kernel's source line, and a number of its own.
#define AT(number) (emu::Site{__FILE__, __LINE__, number})

namespace translated {

using namespace lspm::cuda;
namespace ptx = lspm::cuda::ptx;

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

template <class T, class From>
inline T as(From from) {  // the low bits, as a T
  T to{};
  memcpy(&to, &from, std::min(sizeof(T), sizeof(From)));
  return to;
}
// Into a register: integers extend by their own signedness, anything else by bits.
template <class Register, class T>
inline void set(Register& to, T value) {
  if constexpr (std::is_integral<T>::value && std::is_integral<Register>::value) {
    to = static_cast<Register>(value);
  } else {
    static_assert(sizeof(Register) == sizeof(T) || std::is_integral<T>::value, "a float of the wrong size");
    to = as<Register>(value);
  }
}
template <class Register>
inline void poison(Register& to) {
  memset(&to, 0xFF, sizeof to);
}
inline char* at(u64 address) { return reinterpret_cast<char*>(address); }
inline char* at_shared(u32 address) { return emu::from_shared(address); }

template <class T>
inline T shl(T a, u32 n) {
  return n >= sizeof(T) * 8 ? 0 : static_cast<T>(a << n);
}
template <class T>
inline T shr(T a, u32 n) {
  return n >= sizeof(T) * 8 ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> n);
}
inline u32 shf_l(u32 low, u32 high, u32 n) { return ((u64(high) << 32 | low) << n) >> 32; }
inline u32 shf_r(u32 low, u32 high, u32 n) { return (u64(high) << 32 | low) >> n; }
inline u32 bfi(u32 field, u32 into, u32 position, u32 bits) {
  const u32 mask = shl(bits >= 32 ? ~0u : (1u << bits) - 1, position);
  return (into & ~mask) | (shl(field, position) & mask);
}
template <class T>
inline T bfe(T from, u32 position, u32 bits) {
  return bits ? shr(static_cast<T>(shl(as<u32>(from), 32 - position - bits)), 32 - bits) : 0;
}
inline u32 prmt(u32 low, u32 high, u32 selectors) {
  const u64 bytes = low | u64(high) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 selector = selectors >> 4 * i;
    const u8 byte = bytes >> 8 * (selector & 7);
    const u8 chosen = selector & 8 ? static_cast<s8>(byte) >> 7 : byte;  // 8: its sign, eight times
    result |= u32(chosen) << 8 * i;
  }
  return result;
}
template <class T>
inline bool unordered(T a, T b) {
  return a != a || b != b;
}

// Two floats in a 64-bit register.
template <class F>
inline u64 each_of_two(F f, u64 a, u64 b, u64 c = 0) {
  auto half = [&](int shift) {
    return u64(as<u32>(f(as<float>(u32(a >> shift)), as<float>(u32(b >> shift)), as<float>(u32(c >> shift)))))
           << shift;
  };
  return half(0) | half(32);
}
// 16-bit arithmetic of one element or two (Register: u16 or u32): in float, then rounded, which is exact but
// for a product's last bit.
template <class T, class Register, class F>
inline Register halves(F f, Register a, Register b, Register c = 0) {
  auto at = [](Register r, unsigned shift) { return to_float(as<T>(static_cast<u16>(u32(r) >> shift))); };
  u32 result = 0;
  for (unsigned shift = 0; shift < 8 * sizeof(Register); shift += 16)
    result |= u32(as<u16>(T(f(at(a, shift), at(b, shift), at(c, shift))))) << shift;
  return static_cast<Register>(result);
}
template <class T>
inline u32 pack(float low, float high) {
  return as<u16>(from_float<T>(low)) | u32(as<u16>(from_float<T>(high))) << 16;
}
template <class To, class From>
inline To saturated(From value) {  // float to integer
  return static_cast<To>(
      std::min<double>(std::max<double>(value, static_cast<double>(std::numeric_limits<To>::min())),
                       static_cast<double>(std::numeric_limits<To>::max())));
}

enum class Shuffle { up, down, bfly, idx };
inline u32 shfl(Shuffle mode, bool& in_segment, u32 value, u32 operand, u32 control, u32 mask, emu::Site at) {
  const int lane = emu::lane, b = operand & 31, segment = control >> 8 & 31, clamp = control & 31;
  const int low = lane & segment, bound = low | (clamp & ~segment);
  const int source = mode == Shuffle::up     ? lane - b
                     : mode == Shuffle::down ? lane + b
                     : mode == Shuffle::bfly ? lane ^ b
                                             : low | (b & ~segment);
  in_segment = mode == Shuffle::up ? source >= bound : source <= bound;
  return emu::shuffle("shfl.sync", mask, value, in_segment ? source : -1, at);
}

template <class T, class Combine>
inline T atomic(char* pointer, T operand, Combine, emu::Site at) {
  auto model = [](u64 old, u64 operand, u64) {
    return emu::to_bits<T>(Combine()(emu::from_bits<T>(old), emu::from_bits<T>(operand)));
  };
  return emu::from_bits<T>(emu::atomic_update(pointer, sizeof(T), model, emu::to_bits(operand), 0, at));
}
struct atomic_add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct atomic_max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct atomic_min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct atomic_exch {
  template <class T>
  T operator()(T, T b) const {
    return b;
  }
};
struct atomic_or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct atomic_and {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};

// ldmatrix and its inverse; lanes past the last matrix give no address.
template <bool kTranspose, int kMatrices>
inline ptx::LdMatrix ldmatrix(char* row, emu::Site at) {
  ptx::LdMatrix matrix = {{}, row};
  if (emu::lane < 8 * kMatrices) ptx::check_row(row, emu::Access::read, "ldmatrix", at);
  emu::collective("ldmatrix", ~0u, true, ptx::model_ldmatrix<kTranspose, kMatrices>, &matrix, at);
  return matrix;
}
template <bool kTranspose, int kMatrices>
EMU_RAW inline void model_stmatrix(void* operands[32], unsigned) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < kMatrices; ++i)
      for (int e = 0; e < 2; ++e) {
        const int a = lane / 4, b = 2 * (lane % 4) + e;
        const int row = kTranspose ? b : a, col = kTranspose ? a : b;
        auto* to = static_cast<const ptx::LdMatrix*>(operands[8 * i + row])->row;
        const u16 value = static_cast<ptx::LdMatrix*>(operands[lane])->r[i] >> 16 * e;
        static_cast<u16*>(const_cast<void*>(to))[col] = value;
      }
}
template <bool kTranspose, int kMatrices>
inline void stmatrix(ptx::LdMatrix matrix, emu::Site at) {
  if (emu::lane < 8 * kMatrices) ptx::check_row(matrix.row, emu::Access::write, "stmatrix", at);
  emu::collective("stmatrix", ~0u, true, model_stmatrix<kTranspose, kMatrices>, &matrix, at);
}

inline void mma(emu::WarpModel model, ptx::Mma& operands, emu::Site at) {
  emu::collective("mma", ~0u, true, model, &operands, at);
}

}  // namespace translated

#include "wgmma.h"
