// Sums over a row of logits that its softmax and its cross entropy take, relative to its largest logit
// (Milakov and Gimelshein 2018): block by block that is found, and from the first-level cache the sums
// follow.
#pragma once
#include <cmath>
#include <limits>

#include "cpu/pairs.h"

namespace lspm::cpu {

constexpr int64_t kBlock = 1024;  // logits, 4 KiB at most

using lspm::exp;
inline Pair exp(Pair v) { return {exp(v.first), exp(v.second)}; }

// The larger ones of `top` and of what the lanes hold, NaN left out.
template <class T>
F larger(Pair v, F top, PairLanes<T>) {
  return max(v.first, max(v.second, top));
}
template <class T>
F larger(F v, F top, Single<T, AllLanes>) {
  return max(v, top);
}
template <class T>
F larger(F v, F top, Single<T, FirstLanes> lanes) {
  return max(first_lanes(v, lanes.n, top), top);
}

// The q of a row, but for what the target's class alone has of it.
template <class T>
struct NoneSpread {
  static constexpr bool kAny = false;
  template <class Lanes>
  auto operator()(int64_t, Lanes lanes) const {
    return decltype(lanes.load(static_cast<const T*>(nullptr))){};
  }
};

template <class T>
struct SmoothSpread {
  static constexpr bool kAny = true;
  const float* weight;
  float each;
  Pair all(PairLanes<T>) const { return {broadcast(each), broadcast(each)}; }
  template <class Lanes>
  F all(Single<T, Lanes>) const {
    return broadcast(each);
  }
  template <class Lanes>
  auto operator()(int64_t c, Lanes lanes) const {
    return weight ? lanes.load_ordered(weight + c) * each : all(lanes);
  }
};

// What a row sums up to, relative to its largest logit where that is finite.
struct Sums {
  float largest = -std::numeric_limits<float>::infinity();
  double exps = 0, logits = 0, q = 0;  // logits: weighted by q, and relative to nothing
};

// What exps are relative to. Where all logits are -inf so far, exp() is 0 of them as they are.
inline float shift_of(float largest) {
  return largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest;
}

// block(begin, end) says where these logits are: they are of T, or floats in the order of T's lanes.
template <class T, class Block, class Spread>
Sums sums_of(int64_t classes, Block block, Spread spread) {
  Sums s;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t count = std::min(kBlock, classes - begin);
    const auto* const x = block(begin, begin + count);
    F top = broadcast(s.largest);
    for_each_pair<T>(0, count, [&](int64_t c, auto lanes) { top = larger(lanes.load(x + c), top, lanes); });
    const float largest = max(top);
    const float shift = shift_of(largest);
    if (largest > s.largest) s.exps *= std::exp(double(s.largest) - shift);
    s.largest = largest;
    F exps{}, products{}, q{};
    for_each_pair<T>(0, count, [&](int64_t c, auto lanes) {
      const auto v = lanes.load(x + c) - shift;
      exps += joined(lanes.keep(exp(v)));
      if constexpr (Spread::kAny) {
        const auto part = lanes.keep(spread(begin + c, lanes));
        products += joined(lanes.keep(part * v));
        q += joined(part);
      }
    });
    s.exps += sum(exps);
    if (Spread::kAny) {
      const double weights = sum(q);
      s.logits += sum(products) + shift * weights;
      s.q += weights;
    }
  }
  return s;
}

}  // namespace lspm::cpu
