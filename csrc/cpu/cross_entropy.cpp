// Cross entropy by an online softmax (Milakov and Gimelshein 2018). A thread owns whole rows. A row is read
// from memory once: block by block its largest logit is found, and from the first-level cache the sums follow
// that are relative to it. The backward reads a row once and writes it once, from the two numbers that the
// forward kept of it. Sums over rows are of runs of kRun rows, whatever the number of threads.
// Bytes per logit, in sizes of T: forward 1, backward 2; with probabilities one more.
#include "cross_entropy.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/softmax_sums.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kRun = 32;  // rows

template <class T>
struct ProbabilitySpread {
  static constexpr bool kAny = true;
  const T* target;
  const float* weight;
  float kept, each;
  template <class Lanes>
  auto operator()(int64_t c, Lanes lanes) const {
    const auto q = lanes.load(target + c) * kept + each;
    return weight ? q * lanes.load_ordered(weight + c) : q;
  }
};

template <class T>
struct Job {
  const T* logits;
  const int64_t* classes;  // of the targets, or null
  const T* probabilities;  // or null
  const float* weight;
  const CrossEntropyShape& shape;

  Job(const void* logits, const void* target, const float* weight, const CrossEntropyShape& s)
      : logits(static_cast<const T*>(logits)),
        classes(s.probabilities ? nullptr : static_cast<const int64_t*>(target)),
        probabilities(s.probabilities ? static_cast<const T*>(target) : nullptr),
        weight(weight),
        shape(s) {}

  float each() const { return shape.smoothing / float(shape.classes); }
  float weight_of(int64_t c) const { return weight ? weight[c] : 1.0f; }
  bool ignored(int64_t row) const { return classes && classes[row] == shape.ignore_index; }
  bool known(int64_t row) const {
    return !classes || (classes[row] >= 0 && classes[row] < shape.classes) || ignored(row);
  }

  // Calls body(spread) for the q of a row.
  template <class Body>
  auto with_spread(int64_t row, Body body) const {
    if (probabilities)
      return body(
          ProbabilitySpread<T>{probabilities + row * shape.classes, weight, 1 - shape.smoothing, each()});
    return shape.smoothing > 0 ? body(SmoothSpread<T>{weight, each()}) : body(NoneSpread<T>{});
  }
};

template <class T>
struct Forward : Job<T> {
  using Job<T>::Job;
  T* loss;  // of each row, or null
  float* statistics;
  First* unknown;  // the first row whose class is none

  struct Total {
    double loss = 0, weight = 0;
  };

  Total run(int64_t begin, int64_t end) const {
    Total total;
    for (; begin < end; ++begin) {
      const Total row = of_row(begin);
      if (loss) put(loss + begin, row.loss);
      total.loss += row.loss;
      total.weight += row.weight;
    }
    return total;
  }

  Total of_row(int64_t row) const {
    const CrossEntropyShape& s = this->shape;
    if (!this->known(row)) unknown->report(row);
    if (!this->known(row) || this->ignored(row)) {
      keep(row, 0, 0, 0);
      return {};
    }
    const T* const x = this->logits + row * s.classes;
    const auto block = [x](int64_t begin, int64_t) { return x + begin; };
    const Sums sums =
        this->with_spread(row, [&](auto spread) { return sums_of<T>(s.classes, block, spread); });
    const double log = std::log(sums.exps), lse = sums.largest + log;
    if (!this->classes) {
      keep(row, sums.largest, log, sums.q);
      return {lse * sums.q - sums.logits, 1};
    }
    const int64_t target = this->classes[row];
    const double weight = this->weight_of(target), hit = (1.0 - s.smoothing) * weight;
    keep(row, sums.largest, log, hit + sums.q);
    const double smoothed = s.smoothing > 0 ? lse * sums.q - sums.logits : 0;
    return {(log - (double(get(x + target)) - sums.largest)) * hit + smoothed, weight};
  }

  void keep(int64_t row, float largest, double log, double q) const {
    if (!statistics) return;
    statistics[row] = largest;
    statistics[this->shape.rows + row] = float(log);
    statistics[2 * this->shape.rows + row] = float(q);
  }

  static float get(const T* p) { return FirstLanes{1}.load(p)[0]; }
  static void put(T* p, double v) { FirstLanes{1}.store(p, broadcast(float(v))); }
};

template <class T>
void forward(const void* logits, const void* target, const float* weight, void* loss, float* statistics,
             const CrossEntropyShape& s, int threads) {
  using Run = Forward<T>;
  Run job(logits, target, weight, s);
  First unknown;
  const bool reduced = s.reduction != Reduction::none;
  job.loss = reduced ? nullptr : static_cast<T*>(loss);
  job.statistics = statistics;
  job.unknown = &unknown;
  std::vector<typename Run::Total> runs((s.rows + kRun - 1) / kRun);
  parallel_for(int64_t(runs.size()), s.rows * s.classes, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) runs[begin] = job.run(begin * kRun, std::min((begin + 1) * kRun, s.rows));
  });
  if (const int64_t row = unknown.get(); row >= 0)
    throw std::invalid_argument("cross_entropy: target must be from 0 to " + std::to_string(s.classes - 1) +
                                " or " + std::to_string(s.ignore_index) + ", got " +
                                std::to_string(job.classes[row]));
  typename Run::Total total;
  for (const auto& run : runs) {
    total.loss += run.loss;
    total.weight += run.weight;
  }
  const double divisor = s.reduction == Reduction::mean ? total.weight : 1;
  if (statistics) statistics[3 * s.rows] = float(divisor);
  if (reduced) Run::put(static_cast<T*>(loss), total.loss / divisor);
}

template <class T>
struct Backward : Job<T> {
  using Job<T>::Job;
  const T* dloss;
  const float* statistics;
  T* dlogits;

  void rows(int64_t begin, int64_t end) const {
    const CrossEntropyShape& s = this->shape;
    for (; begin < end; ++begin) {
      T* const out = dlogits + begin * s.classes;
      if (this->ignored(begin) || !this->known(begin))
        std::fill(out, out + s.classes, T{});
      else
        this->with_spread(begin, [&](auto spread) { row(begin, out, spread); });
    }
  }

  template <class Spread>
  void row(int64_t r, T* out, Spread spread) const {
    const CrossEntropyShape& s = this->shape;
    const T* const x = this->logits + r * s.classes;
    const float largest = statistics[r], log = statistics[s.rows + r];
    const float scale =
        Forward<T>::get(dloss + (s.reduction == Reduction::none ? r : 0)) / statistics[3 * s.rows];
    const float all = scale * statistics[2 * s.rows + r];
    const auto gradient = [&](int64_t c, auto lanes) {
      const auto v = exp((lanes.load(x + c) - largest) - log) * all;
      if constexpr (Spread::kAny)
        return v - spread(c, lanes) * scale;
      else
        return v;
    };
    for_each_pair<T>(0, s.classes, [&](int64_t c, auto lanes) { lanes.store(out + c, gradient(c, lanes)); });
    if (!this->classes) return;
    const int64_t target = this->classes[r];
    const float hit = scale * (1 - s.smoothing) * this->weight_of(target);
    Forward<T>::put(out + target, gradient(target, Single<T, FirstLanes>(1))[0] - hit);
  }
};

template <class T>
void backward(const void* dloss, const void* logits, const void* target, const float* weight,
              const float* statistics, void* dlogits, const CrossEntropyShape& s, int threads) {
  Backward<T> job(logits, target, weight, s);
  job.dloss = static_cast<const T*>(dloss);
  job.statistics = statistics;
  job.dlogits = static_cast<T*>(dlogits);
  prepare_output(job.dlogits, s.rows * s.classes);
  parallel_for(s.rows, s.rows * s.classes, threads,
               [&](int64_t begin, int64_t end) { job.rows(begin, end); });
}

}  // namespace

void cross_entropy_forward(const void* logits, const void* target, const float* weight, void* loss,
                           float* statistics, const CrossEntropyShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &forward<float>
                   : shape.dtype == DType::bf16 ? &forward<bf16>
                                                : &forward<f16>;
  run(logits, target, weight, loss, statistics, shape, threads);
}

void cross_entropy_backward(const void* dloss, const void* logits, const void* target, const float* weight,
                            const float* statistics, void* dlogits, const CrossEntropyShape& shape,
                            int threads) {
  const auto run = shape.dtype == DType::f32    ? &backward<float>
                   : shape.dtype == DType::bf16 ? &backward<bf16>
                                                : &backward<f16>;
  run(dloss, logits, target, weight, statistics, dlogits, shape, threads);
}

}  // namespace lspm::cpu
