// Stochastic gradient descent on a factorisation, block by block of a Latin square.
//
// An update reads and writes two rows, 16 bytes to a factor, which the next rating's seldom are: the rows of
// ratings further on are fetched, and the processor overlaps updates that have no row in common.
#include "mf_sgd.h"

#include <atomic>
#include <cmath>
#include <type_traits>

#include "cpu/latin_square.h"
#include "random_bits.h"

namespace lspm::cpu {
namespace {

// How the new values of two rows are stored.
struct Exact {
  Exact(int64_t, int64_t) {}
  template <class Lanes>
  void store(float* p, float* q, int64_t, F new_p, F new_q, Lanes lanes) const {
    lanes.store(p, new_p);
    lanes.store(q, new_q);
  }
};
struct AtRandom {
  U lane;  // the bits of the rating and of each lane's factor in a row's first vector
  AtRandom(int64_t seed, int64_t place) {
    static constexpr Order kApart{[](int i) { return uint32_t(i) * kBitsApart; }};
    std::memcpy(&lane, kApart.of, sizeof lane);
    lane += uint32_t(random_bits(seed, place) >> 32);
  }
  template <class Lanes>
  void store(bf16* p, bf16* q, int64_t factor, F new_p, F new_q, Lanes lanes) const {
    const auto bits = row_bits<U>(lane + uint32_t(factor) * kBitsApart);
    lanes.store_unchanged(p, rounded(new_p, bits.user));
    lanes.store_unchanged(q, rounded(new_q, bits.item));
  }
  static F rounded(F v, U bits) {
    const U exact = reinterpret_cast<U>(v);
    const U kept = v - v == v - v ? exact + bits : exact;  // what is not finite stays so
    return reinterpret_cast<F>(kept & 0xffff0000u);
  }
};
template <class T>
using RoundingOf = std::conditional_t<std::is_same_v<T, bf16>, AtRandom, Exact>;

// One side of an update: a row, and what it is changed by.
template <class T>
struct Side {
  T* row;
  float *bias, *squares, l2, l2_bias, l1;
};

template <class T, int kVectors, bool kPlain>
struct Job {
  const MfSgdTables& tables;
  const MfSgdRatings& of;
  const MfSgdShape& shape;
  const MfSgdStep& step;

  Side<T> user(int64_t u) const {
    return {static_cast<T*>(tables.user_factors) + u * shape.factors,
            tables.user_bias ? tables.user_bias + u : nullptr,
            tables.user_squares ? tables.user_squares + u : nullptr,
            step.l2_user,
            step.l2_user_bias,
            step.l1_user};
  }
  Side<T> item(int64_t i) const {
    return {static_cast<T*>(tables.item_factors) + i * shape.factors,
            tables.item_bias ? tables.item_bias + i : nullptr,
            tables.item_squares ? tables.item_squares + i : nullptr,
            step.l2_item,
            step.l2_item_bias,
            step.l1_item};
  }

  bool known(int64_t j) const {
    return uint32_t(of.users[j]) < uint64_t(shape.users) && uint32_t(of.items[j]) < uint64_t(shape.items);
  }

  // lr over the root of the squares, to which the row's mean squared gradient e * other - l2 * row is added.
  float rate(const Side<T>& s, const T* other, float e) const {
    if (kPlain || !s.squares) return step.lr;
    WideSum squares;
    for_each_vector(shape.factors, [&](int64_t k, auto lanes) {
      const F g = e * lanes.load(other + k) - s.l2 * lanes.load(s.row + k);
      squares.add(k, g * g);
    });
    *s.squares += float(squares.total() / double(shape.factors));
    return *s.squares > 0 ? step.lr / std::sqrt(*s.squares) : step.lr;
  }

  F bounded(F v, float shrink) const {
    if constexpr (!kPlain) {
      const F zero{};
      if (shrink > 0) v = v > shrink ? v - shrink : v < -shrink ? v + shrink : v == v ? zero : v;
      if (step.nonnegative) v = v < 0.0f ? zero : v;
    }
    return v;
  }

  // At a rate of its own: where factors are small their gradients are, and a rate by these would be huge.
  void bias(const Side<T>& s, float e) const {
    if (s.bias) *s.bias += step.lr_bias * (e - s.l2_bias * *s.bias);
  }

  // One rating; returns its loss.
  double update(int64_t j) const {
    const Side<T> u = user(of.users[j]), i = item(of.items[j]);
    const float weight = of.weights ? of.weights[j] : 1.0f, rating = of.ratings[j];
    // The score, less the rating where only that is asked for; the rows' product last, as it takes longest.
    float score = step.logistic ? step.mean : step.mean - rating;
    if (u.bias) score += *u.bias;
    if (i.bias) score += *i.bias;
    score +=
        sum_over_factors<kVectors>(shape.factors, [&](int64_t k, auto lanes) __attribute__((always_inline)) {
          return lanes.load(u.row + k) * lanes.load(i.row + k);
        });
    double loss = double(score) * score;
    float error = -score;
    if (step.logistic) {
      // log(1 + exp(score)) - rating * score, without an overflow.
      loss = std::max(score, 0.0f) - rating * score + std::log1p(std::exp(-std::abs(score)));
      error = rating - 1.0f / (1.0f + std::exp(-score));
    }
    const float e = weight * error;
    const float lr_u = rate(u, i.row, e), lr_i = rate(i, u.row, e);
    // p + (to q - shrink p), as p times a rounded 1 - shrink would drift.
    const float to_u = lr_u * e, to_i = lr_i * e, shrink_u = lr_u * u.l2, shrink_i = lr_i * i.l2;
    const RoundingOf<T> rounding(step.seed, j);
    for_each_factor<kVectors>(shape.factors, [&](int64_t k, auto lanes) __attribute__((always_inline)) {
      const F p = lanes.load(u.row + k), q = lanes.load(i.row + k);
      const F new_p = bounded(p + (to_u * q - shrink_u * p), lr_u * u.l1);
      const F new_q = bounded(q + (to_i * p - shrink_i * q), lr_i * i.l1);
      rounding.store(u.row + k, i.row + k, k, new_p, new_q, lanes);
    });
    bias(u, e);
    bias(i, e);
    return weight * loss;
  }

  // The ratings of a block, in order; returns the place of one that is outside the tables, or -1.
  int64_t block(int64_t begin, int64_t end, float* loss) const {
    double total = 0;
    int64_t stray = -1;
    const bool fetching = outgrow_caches(shape.users + shape.items, shape.factors, sizeof(T), shape.grid);
    for_each_pair_of_rows(
        of.users, begin, end, fetching,
        [&](int64_t j) {
          if (known(j)) fetch_row(user(of.users[j]).row, shape.factors);
        },
        [&](int64_t j) {
          if (known(j)) fetch_row(item(of.items[j]).row, shape.factors);
        },
        [&](int64_t j) {
          if (known(j))
            total += update(j);
          else
            stray = j;
        });
    *loss = float(total);
    return stray;
  }
};

template <class T, int kVectors, bool kPlain>
int64_t run(const MfSgdTables& tables, const MfSgdRatings& of, float* loss, const MfSgdShape& s,
            const MfSgdStep& step, int threads) {
  const Job<T, kVectors, kPlain> job{tables, of, s, step};
  std::atomic<int64_t> stray{-1};
  for_each_block(s.grid, s.ratings * s.factors, threads, [&](int64_t b) {
    const int64_t found = job.block(of.offsets[b], of.offsets[b + 1], loss + b);
    if (found >= 0) stray.store(found, std::memory_order_relaxed);
  });
  return stray.load();
}

// The rows' length as a constant where it is a usual one: a loop of unknown length costs half as much again.
template <class T, bool kPlain>
auto job_of(int64_t factors) {
  if (factors == kLanes) return &run<T, 1, kPlain>;
  if (factors == 2 * kLanes) return &run<T, 2, kPlain>;
  if (factors == 4 * kLanes) return &run<T, 4, kPlain>;
  if (factors == 8 * kLanes) return &run<T, 8, kPlain>;
  return &run<T, 0, kPlain>;
}

template <class T>
auto job_of(int64_t factors, bool plain) {
  return plain ? job_of<T, true>(factors) : job_of<T, false>(factors);
}

}  // namespace

int64_t mf_sgd_update(const MfSgdTables& tables, const MfSgdRatings& ratings, float* loss,
                      const MfSgdShape& s, const MfSgdStep& step, int threads) {
  const bool plain = !tables.user_squares && step.l1_user == 0 && step.l1_item == 0 && !step.nonnegative;
  const auto job = s.dtype == DType::f32 ? job_of<float>(s.factors, plain) : job_of<bf16>(s.factors, plain);
  return job(tables, ratings, loss, s, step, threads);
}

}  // namespace lspm::cpu
