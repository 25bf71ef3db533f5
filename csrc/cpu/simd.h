// Float vectors at the width of the instruction set this file is compiled for; the only intrinsics.
//
// F is a GCC vector type, so + - * / and comparisons work on it, and a scalar broadcasts. What follows adds
// only what the language lacks: loads, stores, conversions and reductions. The same kernel source is compiled
// once for each instruction set, with different -march flags.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif
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

// Rounds to nearest even; a NaN stays a NaN. (vcvtneps2bf16 would flush subnormals to zero, so that results
// would differ between instruction sets for the sake of two instructions in a loop that waits for memory.)
#if defined(__AVX512F__)
inline __m256i to_bf16(F v) {
  __m512i u = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
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

inline float sum(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

// Whole vectors, or the first n lanes of one: for_each_vector() hands one of the two to its body.
struct AllLanes {
  template <class T>
  F load(const T* p) const {
    return lspm::load(p);
  }
  template <class T>
  void store(T* p, F v) const {
    lspm::store(p, v);
  }
  F keep(F v) const { return v; }
};

struct FirstLanes {
  int n;
  template <class T>
  F load(const T* p) const {  // the other lanes read as zero
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return lspm::load(lanes);
  }
  template <class T>
  void store(T* p, F v) const {
    T lanes[kLanes];
    lspm::store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(T));
  }
  F keep(F v) const {  // zeroes the other lanes
    for (int i = n; i < kLanes; ++i) v[i] = 0;
    return v;
  }
};

// Calls body(i, lanes) for each vector of [0, n); the last one may have fewer lanes.
template <class Body>
inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes{});
  if (i < n) body(i, FirstLanes{int(n - i)});
}

}  // namespace lspm
