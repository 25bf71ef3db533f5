// Vectors taken two at a time, in whatever order their elements come apart with the fewest instructions.
//
// 32 bits of memory hold two bfloat16: the even elements are the low halves shifted up, the odd ones the high
// halves as they stand. A loop over elements that never asks which is which so saves half of the conversions
// and all of the shuffles, and a pair of either half type is one whole cache line to store. What meets
// tensors of T must be in T's order too: see load_ordered().
#pragma once
#include <type_traits>

#include "cpu/transpose.h"

namespace lspm {

struct Pair {
  F first, second;
};
inline Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
inline Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
inline Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
inline Pair operator+(Pair a, float b) { return {a.first + b, a.second + b}; }
inline Pair operator-(Pair a, float b) { return {a.first - b, a.second - b}; }
inline Pair operator*(Pair a, float b) { return {a.first * b, a.second * b}; }
inline Pair operator/(Pair a, float b) { return {a.first / b, a.second / b}; }
inline Pair& operator+=(Pair& a, Pair b) { return a = a + b; }
inline Pair& operator*=(Pair& a, Pair b) { return a = a * b; }

inline void add_product(F& sum, F a, F b) { sum += a * b; }
inline void add_product(F& sum, Pair a, Pair b) {
  sum += a.first * b.first;
  sum += a.second * b.second;
}

// A vector or a pair, as type X, that was put at p. A copy of a pair's bytes would go through memory in
// smaller pieces than those that are read there next, which then wait for them.
template <class X>
X stored(const float* p) {
  if constexpr (std::is_same_v<X, Pair>)
    return {load(p), load(p + kLanes)};
  else
    return reinterpret_cast<X>(load(p));
}

// Begins to bring the pair of vectors that lies `ahead` elements after p.
template <class T>
void fetch(const T* p, int64_t ahead) {
  prefetch(p + ahead);
  if constexpr (sizeof(T) == 4) prefetch(p + ahead + kLanes);
}

inline F joined(F v) { return v; }
inline F joined(Pair v) { return v.first + v.second; }

// Turns (a, b), one after the other, into their even and their odd elements; zip() is the way back.
inline void unzip(F& a, F& b) {
  static constexpr Order kEven{[](int i) { return 2 * i; }}, kOdd{[](int i) { return 2 * i + 1; }};
  const F first = shuffle(a, b, kEven);
  b = shuffle(a, b, kOdd);
  a = first;
}
inline void zip(F& a, F& b) {
  static constexpr Order kLow{[](int i) { return i / 2 + (i & 1) * kLanes; }};
  static constexpr Order kHigh{[](int i) { return (i + kLanes) / 2 + (i & 1) * kLanes; }};
  const F first = shuffle(a, b, kLow);
  b = shuffle(a, b, kHigh);
  a = first;
}

// The two halves of what 32-bit elements hold as bfloat16, and back.
inline Pair apart(U u) { return {reinterpret_cast<F>(u << 16), reinterpret_cast<F>(u & 0xffff0000u)}; }
inline U together(Pair v) { return to_pairs(v.first, v.second); }

// Two vectors of elements of T in T's own order; the interface is that of AllLanes and FirstLanes.
template <class T>
struct PairLanes {
  static constexpr bool kApart = std::is_same_v<T, bf16>;

  template <class S>
  Pair load(const S* p) const {
    if constexpr (std::is_same_v<S, bf16>) {
      U u;
      std::memcpy(&u, p, sizeof u);
      return apart(u);
    } else {
      return {lspm::load(p), lspm::load(p + kLanes)};
    }
  }
  // Parameters of T or float, which lie one after the other, put into T's order.
  template <class S>
  Pair load_ordered(const S* p) const {
    Pair v = load(p);
    if constexpr (kApart && std::is_same_v<S, float>) unzip(v.first, v.second);
    return v;
  }

  void store(bf16* p, Pair v) const {
    const U u = together(v);
    std::memcpy(p, &u, sizeof u);
  }
  template <class S>
  void store(S* p, Pair v) const {
    lspm::store(p, v.first);
    lspm::store(p + kLanes, v.second);
  }
  template <class S>
  void store_ordered(S* p, Pair v) const {
    if constexpr (kApart && std::is_same_v<S, float>) zip(v.first, v.second);
    store(p, v);
  }

  void stream(bf16* p, Pair v) const {
    lspm::stream(reinterpret_cast<float*>(p), reinterpret_cast<F>(together(v)));
  }
  void stream(float* p, Pair v) const {
    lspm::stream(p, v.first);
    lspm::stream(p + kLanes, v.second);
  }
  void stream(f16* p, Pair v) const { lspm::stream(p, v.first, v.second); }

  // v as it is after a store to T and a load from it.
  Pair rounded(Pair v) const {
    if constexpr (kApart)
      return apart(together(v));
    else
      return {lspm::rounded<T>(v.first), lspm::rounded<T>(v.second)};
  }
  Pair keep(Pair v) const { return v; }
};

// The same interface for what is left over at the end: single vectors, or the first lanes of one.
template <class T, class Lanes>
struct Single : Lanes {
  template <class... N>
  explicit Single(N... n) : Lanes{n...} {}
  template <class S>
  F load_ordered(const S* p) const {
    return Lanes::load(p);
  }
  template <class S>
  void store_ordered(S* p, F v) const {
    Lanes::store(p, v);
  }
  template <class S>
  void stream(S* p, F v) const {
    Lanes::store(p, v);
  }
  F rounded(F v) const { return lspm::rounded<T>(v); }
};

// Calls body(i, lanes) for each pair of vectors of [begin, n); returns where they end.
template <class T, class Body>
__attribute__((always_inline)) inline int64_t for_each_whole_pair(int64_t begin, int64_t n, Body body) {
  int64_t i = begin;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) body(i, PairLanes<T>{});
  return i;
}

// The same, then for what is left over.
template <class T, class Body>
__attribute__((always_inline)) inline void for_each_pair(int64_t begin, int64_t n, Body body) {
  int64_t i = for_each_whole_pair<T>(begin, n, body);
  if (i + kLanes <= n) body(i, Single<T, AllLanes>{}), i += kLanes;
  if (i < n) body(i, Single<T, FirstLanes>(int(n - i)));
}

}  // namespace lspm
