// Float vectors at the width of the instruction set this file is compiled for; the only intrinsics.
//
// F is a GCC vector type, so + - * / and comparisons work on it, and a scalar broadcasts. What follows adds
// only what the language lacks: loads, stores, conversions and reductions. The same kernel source is compiled
// once for each instruction set, with different -march flags.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace lspm {

#if defined(__AVX512F__)
using F = __m512;
#elif defined(__AVX2__)
using F = __m256;
#else
using F = float __attribute__((vector_size(16)));
#endif
constexpr int kLanes = sizeof(F) / sizeof(float);
using U = uint32_t __attribute__((vector_size(sizeof(F))));

inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

inline F broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return F{x, x, x, x};
#endif
}

inline F load(const bf16* p) {
#if defined(__AVX512F__)
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(__AVX2__)
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<F>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  U u;
  for (int i = 0; i < kLanes; ++i) u[i] = uint32_t(p[i].bits) << 16;
  return reinterpret_cast<F>(u);
#endif
}

// One element.
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline float to_float(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x, sizeof h);
  return float(h);
}

// Rounds to nearest even; a NaN stays a NaN. The instruction takes subnormals for zero, the arithmetic does
// not.
#if defined(__AVX512BF16__)
inline __m256i to_bf16(F v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
#elif defined(__AVX512F__)
inline __m256i to_bf16(F v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
#endif
// Element i of the result holds a[i] in its low half and b[i] in its high half.
inline U to_pairs(F a, F b) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return reinterpret_cast<U>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
#else
  const auto rounded = [](F v) {
    const U u = reinterpret_cast<U>(v);
    return v != v ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
  };
  return (rounded(a) >> 16) | (rounded(b) & 0xffff0000u);
#endif
}
#if defined(__AVX512BF16__)
// Adds the products of pairs of bfloat16, of two to a lane; it takes subnormals for zero.
inline void add_product(F& sum, U a, U b) {
  sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif
inline void store(bf16* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v));
#else
  U u = reinterpret_cast<U>(v);
  u = v != v ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#if defined(__AVX2__)
  auto w = reinterpret_cast<__m256i>(u);
  w = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(w));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = uint16_t(u[i]);
#endif
#endif
}

inline F load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  F v;
  for (int i = 0; i < kLanes; ++i) {
    _Float16 h;
    std::memcpy(&h, p + i, sizeof h);
    v[i] = float(h);
  }
  return v;
#endif
}
inline void store(f16* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) {
    _Float16 h = _Float16(v[i]);
    std::memcpy(p + i, &h, sizeof h);
  }
#endif
}

// Integers, kept as 32-bit lanes: those of 8 and 16 bits are the low ones.
using U8 = uint8_t __attribute__((vector_size(kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));
inline U load(const uint8_t* p) {
#if defined(__AVX512F__)  // GCC 12 takes a convertvector apart, byte by byte
  return reinterpret_cast<U>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<U>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  U8 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, U);
#endif
}
inline U load(const int32_t* p) {
  U v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline F load(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store(uint8_t* p, U v) {
  const U8 low = __builtin_convertvector(v, U8);
  std::memcpy(p, &low, sizeof low);
}
inline void store(uint16_t* p, U v) {
  const U16 low = __builtin_convertvector(v, U16);
  std::memcpy(p, &low, sizeof low);
}
inline void store(int32_t* p, U v) { std::memcpy(p, &v, sizeof v); }

// Stores what was loaded from a T: nothing is rounded, and a subnormal bfloat16 stays.
template <class T>
inline void store_unchanged(T* p, F v) {
  store(p, v);
}
inline void store_unchanged(bf16* p, F v) { store(&p->bits, reinterpret_cast<U>(v) >> 16); }

// v as it is after a store to T and a load from it.
template <class T>
inline F rounded(F v) {
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}
template <>
inline F rounded<float>(F v) {
  return v;
}
#if defined(__AVX512F__)
template <>
inline F rounded<bf16>(F v) {
  return reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(v)), 16));
}
template <>
inline F rounded<f16>(F v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Stores past the cache, which spares reading the line first: for what is too large to stay there anyway.
// p is a multiple of the vector's size in memory. AddressSanitizer sees plain stores only, so it gets those.
inline void stream(float* p, F v) {
#if defined(__SANITIZE_ADDRESS__)
  store(p, v);
#elif defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
inline void stream(f16* p, F a, F b) {  // two vectors, which are one whole line
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
  const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p),
                      _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
  store(p, a);
  store(p + kLanes, b);
#endif
}
// Streamed stores are ordered with nothing; this orders those of the calling thread before what follows.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Begins to bring the line at p, maybe past the end of anything, into the first-level cache or, which lets
// more be on their way at once, the second. GCC leaves out calls of what does nothing but __builtin_prefetch.
template <class T>
inline void prefetch([[maybe_unused]] const T* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" ::"m"(*reinterpret_cast<const char*>(p)));
#endif
}
template <class T>
inline void prefetch_far([[maybe_unused]] const T* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" ::"m"(*reinterpret_cast<const char*>(p)));
#endif
}

// The lanes of a and of b, one after the other, that a shuffle takes. As constants: the compiler would else
// put the vector of indices together, lane by lane, before each shuffle.
struct Order {
  uint32_t of[kLanes];
  template <class Of>
  explicit constexpr Order(Of lane) : of{} {
    for (int i = 0; i < kLanes; ++i) of[i] = uint32_t(lane(i));
  }
};
inline F shuffle(F a, F b, const Order& order) {
  U u;
  std::memcpy(&u, order.of, sizeof u);
  return __builtin_shuffle(a, b, u);
}

// Where lanes i and i ^ kHalf change places between two vectors, what becomes of either.
template <int kHalf>
constexpr Order kExchangedLow{[](int i) { return i & kHalf ? kLanes + i - kHalf : i; }};
template <int kHalf>
constexpr Order kExchangedHigh{[](int i) { return i & kHalf ? kLanes + i : i + kHalf; }};

#if defined(__AVX512F__)
inline float sum(F v) { return _mm512_reduce_add_ps(v); }
#else
template <int kHalf = kLanes / 2>
inline float sum(F v) {  // in pairs, as that instruction does
  v += shuffle(v, v, kExchangedHigh<kHalf>);
  if constexpr (kHalf > 1) return sum<kHalf / 2>(v);
  return v[0];
}
#endif

// A sum over vectors, whose element i is the first of its vector, that rounds as little at any width: of 16
// lanes side by side, which are added up as doubles.
class WideSum {
 public:
  void add(int64_t i, F v) { parts_[i / kLanes % kParts] += v; }
  double total() const {
#if defined(__AVX512F__)
    const __m256 low = _mm512_castps512_ps256(parts_[0]), high = _mm512_extractf32x8_ps(parts_[0], 1);
    return _mm512_reduce_add_pd(_mm512_cvtps_pd(low) + _mm512_cvtps_pd(high));
#else
    double total = 0;
    for (const F& part : parts_)
      for (int i = 0; i < kLanes; ++i) total += double(part[i]);
    return total;
#endif
  }

 private:
  static constexpr int64_t kParts = 16 / kLanes;
  F parts_[kParts] = {};
};

// The larger of two lanes; b where either is NaN.
inline F max(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline float max(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// A bit for each lane where a <= b does not hold: where a is larger or either is NaN.
inline uint32_t not_at_most(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
#else
  const auto at_most = a <= b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(at_most[i] == 0) << i;
  return bits;
#endif
}

// Stores those lanes of v that have a bit, one behind the other, and anything up to a whole vector behind
// them; returns how many they are.
inline int64_t store_some(float* p, F v, uint32_t lanes) {
#if defined(__AVX512F__)  // in two steps: compressed into memory it takes a hundred cycles on Zen
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(lanes), v));
  return __builtin_popcount(lanes);
#else
  int64_t n = 0;
  for (int i = 0; i < kLanes; ++i) p[n] = v[i], n += lanes >> i & 1;
  return n;
#endif
}

// Lanes [0, n) of v, the others of `rest`.
inline F first_lanes(F v, int64_t n, F rest) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(rest, n < 0 ? 0 : n < kLanes ? __mmask16((1u << n) - 1) : __mmask16(0xffff), v);
#else
  F lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = float(i);
  return lane < float(n) ? v : rest;
#endif
}

// The integer nearest to x, for |x| < 2 ** 22.
inline F nearest(F x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2 ** 23, which leaves no bit for a fraction
  return (x + kRound) - kRound;
#endif
}

// v * 2 ** n for an integer n from -252 to 254.
inline F times_power(F v, F n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, n);
#else
  // In two factors, as 2 ** n alone may be outside of the normal range.
  using I = int32_t __attribute__((vector_size(sizeof(F))));
  const I i = __builtin_convertvector(n, I), half = i >> 1;
  return v * reinterpret_cast<F>((half + 127) << 23) * reinterpret_cast<F>((i - half + 127) << 23);
#endif
}

// e ** x for x < 88: 0 at -inf, NaN at NaN. Within 1 ulp with fused multiply-add, 2 without; results below
// the normal range lose only what they round away.
inline F exp(F x) {
  x = max(broadcast(-110.0f), x);
  const F n = nearest(x * 1.44269504f);
  // x = n log 2 + r, with log 2 in two parts, the first so short that its product with n is exact.
  const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  // The minimax polynomial on |r| <= log(2) / 2 (Remez); its relative error is 1.9e-9.
  F p = r * 1.38368382e-3f + 8.37482207e-3f;
  p = p * r + 4.16682260e-2f;
  p = p * r + 1.66664201e-1f;
  p = p * r + 4.99999921e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return times_power(p, n);
}

// `yes` where a byte at p is not 0.
inline F select(const uint8_t* p, F yes, F no) { return load(p) != 0u ? yes : no; }

// The two halves of the 64-bit products a * b.
inline void multiply_wide(U a, uint32_t b, U& high, U& low) {
#if defined(__AVX512F__)
  const auto x = reinterpret_cast<__m512i>(a);
  const __m512i y = _mm512_set1_epi32(int(b)), even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  low = reinterpret_cast<U>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
  high = reinterpret_cast<U>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
  const auto x = reinterpret_cast<__m256i>(a);
  const __m256i y = _mm256_set1_epi32(int(b)), even = _mm256_mul_epu32(x, y);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  low = reinterpret_cast<U>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  high = reinterpret_cast<U>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t(a[i]) * b;
    low[i] = uint32_t(product);
    high[i] = uint32_t(product >> 32);
  }
#endif
}

// The first n elements at p, the others as zeros, and the way back. Where there are masks it is by a
// register: in memory a copy of n elements is a call, and what reads it waits for it.
template <class T>
inline void load_first(const T* p, int n, T (&lanes)[kLanes]) {
#if defined(__AVX512F__)
  const auto first = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 1)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), _mm_maskz_loadu_epi8(first, p));
  else if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(first, p));
  else
    _mm512_storeu_si512(lanes, _mm512_maskz_loadu_epi32(first, p));
#else
  std::fill(lanes, lanes + kLanes, T{});
  std::memcpy(lanes, p, n * sizeof(T));
#endif
}
template <class T>
inline void store_first(T* p, int n, const T (&lanes)[kLanes]) {
#if defined(__AVX512F__)
  const auto first = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 1)
    _mm_mask_storeu_epi8(p, first, _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes)));
  else if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  else
    _mm512_mask_storeu_epi32(p, first, _mm512_loadu_si512(lanes));
#else
  std::memcpy(p, lanes, n * sizeof(T));
#endif
}

}  // namespace lspm
