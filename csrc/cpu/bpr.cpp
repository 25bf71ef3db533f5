// Bayesian personalised ranking, block by block of a Latin square: an update reads and writes three rows.
#include "bpr.h"

#include <atomic>
#include <cmath>

#include "cpu/latin_square.h"
#include "random_bits.h"

namespace lspm::cpu {
namespace {

struct Tables {
  float *user_factors, *item_factors, *item_bias;
};

template <int kVectors>
struct Job {
  const Tables& tables;
  const BprPairs& of;
  const BprShape& shape;
  const BprStep& step;

  float* user(int64_t u) const { return tables.user_factors + u * shape.factors; }
  float* item(int64_t i) const { return tables.item_factors + i * shape.factors; }

  bool known(int64_t j) const {
    return uint32_t(of.users[j]) < uint64_t(shape.users) && uint32_t(of.items[j]) < uint64_t(shape.items);
  }

  int64_t draw(int64_t j, int64_t part, int64_t attempt) const {
    const int64_t first = of.part_offsets[part], size = of.part_offsets[part + 1] - first;
    if (size < 1) return of.items[j];
    return of.part_items[first + random_below(size, step.seed, j * kBprDraws + attempt)];
  }

  bool has_seen(int64_t u, int64_t i) const {
    return of.seen &&
           std::binary_search(of.seen + of.seen_indptr[u], of.seen + of.seen_indptr[u + 1], int32_t(i));
  }

  // An item of the part for pair j that is not its own and that its user has not seen, or -1.
  int64_t other(int64_t j, int64_t part) const {
    for (int64_t attempt = 0; attempt < kBprDraws; ++attempt) {
      const int64_t i = draw(j, part, attempt);
      if (i != of.items[j] && !has_seen(of.users[j], i)) return i;
    }
    return -1;
  }

  // One pair; returns its loss.
  double update(float* p, float* q, float* r, float* bias_q, float* bias_r) const {
    F sums{};
    for_each_factor<kVectors>(shape.factors, [&](int64_t k, auto lanes) __attribute__((always_inline)) {
      sums += lanes.load(p + k) * (lanes.load(q + k) - lanes.load(r + k));
    });
    const float x = sum(sums) + (bias_q ? *bias_q - *bias_r : 0.0f);
    const float g = step.lr / (1.0f + std::exp(x));
    const float shrink_user = step.lr * step.l2_user, shrink_item = step.lr * step.l2_item;
    for_each_factor<kVectors>(shape.factors, [&](int64_t k, auto lanes) __attribute__((always_inline)) {
      const F u = lanes.load(p + k), i = lanes.load(q + k), j = lanes.load(r + k);
      lanes.store(p + k, u + (g * (i - j) - shrink_user * u));
      lanes.store(q + k, i + (g * u - shrink_item * i));
      lanes.store(r + k, j - (g * u + shrink_item * j));
    });
    if (bias_q) {
      const float shrink = step.lr * step.l2_bias;
      *bias_q += g - shrink * *bias_q;
      *bias_r -= g + shrink * *bias_r;
    }
    return std::max(-x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
  }

  int64_t block(int64_t b, float* loss, int32_t* skipped) const {
    const int64_t part = (b % shape.grid + b / shape.grid) % shape.grid;
    double total = 0;
    int32_t without = 0;
    int64_t stray = -1;
    const int64_t rows = shape.users + shape.items;
    for_each_pair_of_rows(
        of.users, of.offsets[b], of.offsets[b + 1],
        outgrow_caches(rows, shape.factors, sizeof(float), shape.grid),
        [&](int64_t j) {
          if (known(j)) fetch_row(user(of.users[j]), shape.factors);
        },
        [&](int64_t j) {
          if (!known(j)) return;
          fetch_row(item(of.items[j]), shape.factors);
          fetch_row(item(draw(j, part, 0)), shape.factors);
        },
        [&](int64_t j) {
          if (!known(j)) return void(stray = j);
          const int64_t q = of.items[j], r = other(j, part);
          if (r < 0) return void(++without);
          float* const bias = tables.item_bias;
          total += update(user(of.users[j]), item(q), item(r), bias ? bias + q : nullptr,
                          bias ? bias + r : nullptr);
        });
    loss[b] = float(total);
    skipped[b] = without;
    return stray;
  }
};

template <int kVectors>
int64_t run(const Tables& tables, const BprPairs& of, float* loss, int32_t* skipped, const BprShape& s,
            const BprStep& step, int threads) {
  const Job<kVectors> job{tables, of, s, step};
  std::atomic<int64_t> stray{-1};
  for_each_block(s.grid, s.pairs * s.factors, threads, [&](int64_t b) {
    const int64_t found = job.block(b, loss, skipped);
    if (found >= 0) stray.store(found, std::memory_order_relaxed);
  });
  return stray.load();
}

}  // namespace

int64_t bpr_update(float* user_factors, float* item_factors, float* item_bias, const BprPairs& pairs,
                   float* loss, int32_t* skipped, const BprShape& s, const BprStep& step, int threads) {
  const Tables tables{user_factors, item_factors, item_bias};
  const auto job = s.factors == 2 * kLanes   ? &run<2>
                   : s.factors == 4 * kLanes ? &run<4>
                   : s.factors == 8 * kLanes ? &run<8>
                                             : &run<0>;
  return job(tables, pairs, loss, skipped, s, step, threads);
}

}  // namespace lspm::cpu
