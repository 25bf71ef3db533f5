// The statistics of a norm, of a row that is seen once.
#pragma once
#include "cpu/pairs.h"

namespace lspm::cpu {

// The mean and the sum of squared deviations of a row that is seen once. Eight vectors at a time stay in
// registers until their own mean, lane by lane, is known; what lies between these means and the row's is
// added in the end (Chan, Golub and LeVeque 1979). So a large mean cancels nothing, and no second pass over
// the row is needed.
template <class T>
class RowStatistics {
 public:
  static int64_t room(int64_t cols) { return cols / kGroup + 8 * kLanes + kLanes; }

  // value(i, lanes) gives the row's elements from i on. `centers` is room for what lies between.
  template <class Value>
  RowStatistics(int64_t cols, bool centered, float* centers, Value value) : cols_(cols), centers_(centers) {
    int64_t i = 0;
    for (; i + kGroup * kLanes <= cols; i += kGroup * kLanes, ++groups_) {
      Pair v[kGroup / 2];
#pragma GCC unroll 4
      for (int p = 0; p < kGroup / 2; ++p) v[p] = value(i + 2 * p * kLanes, PairLanes<T>{});
      const F sum = joined((v[0] + v[1]) + (v[2] + v[3]));
      const F center = centered ? sum * (1.0f / kGroup) : F{};
      total_ += sum;
      store(centers + groups_ * kLanes, center);
#pragma GCC unroll 4
      for (Pair& p : v) p = {p.first - center, p.second - center};
      squares_ += joined((v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]));
    }
    rest_ = i;
    for_each_pair<T>(i, cols, [&](int64_t at, auto lanes) {
      const auto v = lanes.keep(value(at, lanes));
      total_ += joined(v);
      lanes.store(centers + groups_ * kLanes + at - rest_, v);
    });
  }

  // The mean of what is left of the elements behind a first mean is what adding them up in float lost of it.
  float mean() const {
    const float first = sum(total_) / cols_;
    F left{}, rest{};
    for (int64_t g = 0; g < groups_; ++g) left += load(centers_ + g * kLanes) - first;
    for_each_vector(cols_ - rest_, [&](int64_t i, auto lanes) {
      rest += lanes.keep(lanes.load(centers_ + groups_ * kLanes + i) - first);
    });
    return first + sum(left * float(kGroup) + rest) / cols_;
  }
  // The sum of squared deviations from `mean`.
  float squares(float mean) const {
    F between{}, rest{};
    for (int64_t g = 0; g < groups_; ++g) {
      const F d = load(centers_ + g * kLanes) - mean;
      between += d * d;
    }
    for_each_vector(cols_ - rest_, [&](int64_t i, auto lanes) {
      const F d = lanes.keep(lanes.load(centers_ + groups_ * kLanes + i) - mean);
      rest += d * d;
    });
    return sum(squares_ + between * float(kGroup) + rest);
  }

 private:
  static constexpr int kGroup = 8;

  int64_t cols_, groups_ = 0, rest_ = 0;  // rest_: where the groups end
  float* centers_;
  F total_{}, squares_{};
};

}  // namespace lspm::cpu
