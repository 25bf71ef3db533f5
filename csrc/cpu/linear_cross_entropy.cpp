// What stands between the products of linear_cross_entropy: a pass that reads a block of logits and one that
// turns it into its gradient. A thread owns whole rows, and in the sum for the bias whole columns, so that
// results do not depend on the number of threads. A block was just written by a product and is about to be
// read by another, and is small enough for the last-level cache. Bytes per logit, in sizes of T: forward 1,
// backward 2; with a gradient of the bias one more.
#include "linear_cross_entropy.h"

#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/softmax_sums.h"
#include "cpu/tanh.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kRun = 32;  // rows: rounding errors grow with a sum's length, so it is a sum of sums
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using lspm::tanh;
Pair tanh(Pair v) { return {tanh(v.first), tanh(v.second)}; }

// The derivative of tanh. 1 - tanh^2 would lose what is small of it.
F slope(F v) {
  const F far = exp((v < 0.0f ? v : -v) * 2.0f), sum = far + 1.0f;
  return far * 4.0f / (sum * sum);
}
Pair slope(Pair v) { return {slope(v.first), slope(v.second)}; }

template <class T>
struct Block {
  const int64_t* target;
  const float* weight;
  const LinearCrossEntropyShape& s;

  float weight_of(int64_t c) const { return weight ? weight[c] : 1.0f; }
  bool ignored(int64_t row) const { return target[row] == s.ignore_index; }
  bool known(int64_t row) const { return target[row] >= 0 && target[row] < s.classes && !ignored(row); }
  double hit(int64_t row) const { return (1.0 - s.smoothing) * weight_of(target[row]); }
  bool has_target(int64_t row) const { return target[row] >= s.first && target[row] < s.first + s.cols; }

  // The logits that the loss sees, of what the product made.
  template <class V>
  V capped(V product) const {
    return s.softcap > 0 ? tanh(product / s.softcap) * s.softcap : product;
  }
  float logit(const T* x, int64_t c) const { return capped(FirstLanes{1}.load(x + c))[0]; }

  // Calls body(spread) for the q of the block's classes.
  template <class Body>
  auto with_spread(Body body) const {
    const float each = s.smoothing / float(s.classes);
    return s.smoothing > 0 ? body(SmoothSpread<T>{weight ? weight + s.first : nullptr, each})
                           : body(NoneSpread<T>{});
  }
};

template <class T>
struct Forward : Block<T> {
  float *kept, *losses;

  float& of(int which, int64_t row) const { return kept[which * this->s.rows + row]; }

  void row(const T* x, int64_t r) const {
    const auto& s = this->s;
    if (s.begins()) {
      of(0, r) = -kInfinity;
      for (int which = 1; which < 5; ++which) of(which, r) = 0;
    }
    if (!this->known(r)) {
      if (s.ends()) of(0, r) = 0, losses[r] = of(1, r) = this->ignored(r) ? 0 : kNaN;
      return;
    }
    if (s.softcap > 0) {
      float block[kBlock];
      add(r, sums(s.cols, [&](int64_t begin, int64_t end) {
            for_each_pair<T>(begin, end, [&](int64_t c, auto lanes) {
              lanes.store(block + c - begin, this->capped(lanes.load(x + c)));
            });
            return static_cast<const float*>(block);
          }));
    } else {
      add(r, sums(s.cols, [&](int64_t begin, int64_t) { return x + begin; }));
    }
    if (this->has_target(r)) of(4, r) = this->logit(x, this->target[r] - s.first);
    if (s.ends()) end(r);
  }

  template <class Source>
  Sums sums(int64_t cols, Source source) const {
    return this->with_spread([&](auto spread) { return sums_of<T>(cols, source, spread); });
  }

  // Brings what is kept and what comes to the larger of both logits.
  void add(int64_t r, const Sums& sums) const {
    const float before = of(0, r), largest = std::max(before, sums.largest), shift = shift_of(largest);
    const double q = of(2, r);
    of(0, r) = largest;
    of(1, r) = float(of(1, r) * std::exp(double(before) - shift) +
                     sums.exps * std::exp(double(sums.largest) - shift));
    if (this->s.smoothing == 0) return;
    of(2, r) = float(q + sums.q);
    of(3, r) = float(of(3, r) + q * (double(shift_of(before)) - shift) + (sums.logits - shift * sums.q));
  }

  void end(int64_t r) const {
    const auto& s = this->s;
    const double log = std::log(double(of(1, r))), lse = of(0, r) + log, q = of(2, r), hit = this->hit(r);
    double loss = (log - (double(of(4, r)) - of(0, r))) * hit;
    if (s.smoothing > 0) loss += log * q - of(3, r);
    if (s.z_loss > 0) loss += s.z_loss * this->weight_of(this->target[r]) * lse * lse;
    losses[r] = float(loss);
    of(1, r) = float(log);
    of(2, r) = float(q + hit);
  }
};

template <class T>
struct Backward : Block<T> {
  const float *dloss, *dlse, *statistics;
  float* dbias;

  void row(T* x, int64_t r) const {
    const auto& s = this->s;
    if (!this->known(r)) {
      T none[1];
      FirstLanes{1}.store(none, broadcast(this->ignored(r) ? 0.0f : kNaN));
      return std::fill(x, x + s.cols, none[0]);
    }
    const float largest = statistics[r], log = statistics[s.rows + r], scale = dloss[r];
    double q = statistics[2 * s.rows + r];
    if (s.z_loss > 0) q += 2.0 * s.z_loss * this->weight_of(this->target[r]) * (double(largest) + log);
    const float all = float(scale * q + (dlse ? dlse[r] : 0));
    this->with_spread([&](auto spread) {
      const auto gradient = [&](int64_t c, auto lanes, float hit) {
        const auto v = lanes.load(x + c);
        auto d = exp((this->capped(v) - largest) - log) * all;
        if constexpr (decltype(spread)::kAny) d = d - spread(c, lanes) * scale;
        d = d + -hit;
        if (s.softcap > 0) d = d * slope(v / s.softcap);
        return d;
      };
      const int64_t target = this->target[r] - s.first;
      const bool here = this->has_target(r);
      const F of_target =
          here ? gradient(target, Single<T, FirstLanes>(1), float(scale * this->hit(r))) : F{};
      for_each_pair<T>(0, s.cols,
                       [&](int64_t c, auto lanes) { lanes.store(x + c, gradient(c, lanes, 0.0f)); });
      if (here) FirstLanes{1}.store(x + target, of_target);
    });
  }

  void columns(const T* x, int64_t begin, int64_t end) const {
    const auto& s = this->s;
    for (int64_t run = 0; run < s.rows; run += kRun)
      for_each_vector(end - begin, [&](int64_t c, auto lanes) {
        F sum{};
        for (int64_t r = run; r < std::min(run + kRun, s.rows); ++r)
          sum += lanes.load(x + r * s.cols + begin + c);
        lanes.store(dbias + begin + c, lanes.load(dbias + begin + c) + sum);
      });
  }
};

template <class T>
void forward(const void* logits, const Block<float>& block, float* kept, float* losses, int threads) {
  const auto& s = block.s;
  const Forward<T> job{{block.target, block.weight, s}, kept, losses};
  const T* const x = static_cast<const T*>(logits);
  parallel_for(s.rows, s.rows * s.cols, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) job.row(x + begin * s.cols, begin);
  });
}

template <class T>
void backward(void* logits, const Block<float>& block, const float* dloss, const float* dlse,
              const float* statistics, float* dbias, int threads) {
  const auto& s = block.s;
  const Backward<T> job{{block.target, block.weight, s}, dloss, dlse, statistics, dbias};
  T* const x = static_cast<T*>(logits);
  parallel_for(s.rows, s.rows * s.cols, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) job.row(x + begin * s.cols, begin);
  });
  if (!dbias) return;
  parallel_for((s.cols + kBlock - 1) / kBlock, s.rows * s.cols, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) job.columns(x, begin * kBlock, std::min((begin + 1) * kBlock, s.cols));
  });
}

}  // namespace

void linear_cross_entropy_forward(const void* logits, const int64_t* target, const float* weight, float* kept,
                                  float* losses, const LinearCrossEntropyShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &forward<float>
                   : shape.dtype == DType::bf16 ? &forward<bf16>
                                                : &forward<f16>;
  run(logits, {target, weight, shape}, kept, losses, threads);
}

void linear_cross_entropy_backward(const float* dloss, const float* dlse, void* logits, const int64_t* target,
                                   const float* weight, const float* statistics, float* dbias,
                                   const LinearCrossEntropyShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &backward<float>
                   : shape.dtype == DType::bf16 ? &backward<bf16>
                                                : &backward<f16>;
  run(logits, {target, weight, shape}, dloss, dlse, statistics, dbias, threads);
}

}  // namespace lspm::cpu
