// The step of an optimizer with the gradient of an embedding bag's table. Indices are sorted by row; a thread
// takes some of them at a time and owns the rows that begin there. A row's gradient is added up in registers,
// in the order of its indices, and lies in the first-level cache while the row is changed, once. Rows are met
// in ascending order, so much of a table that is hit often is read as a stream. Bytes, with rows of s bytes:
// 2 s and twice the state a row that changes, s an index from the cache, 32 an index for sorting.
#include "embedding_bag_update.h"

#include "cpu/bags.h"
#include "cpu/random_rounding.h"
#include "cpu/sqrt.h"

namespace lspm::cpu {
namespace {

constexpr const char* kNames[] = {"embedding_bag_sgd_", "embedding_bag_adagrad_", "embedding_bag_adam_"};

template <class T>
class Stepper {
 public:
  Stepper(T* weight, float* first, float* second, int64_t dim, const RowStep& step)
      : weight_(weight), first_(first), second_(second), dim_(dim), step_(step) {
    if (step.optimizer != RowOptimizer::adam) return;
    scale_ = step.lr / (1 - std::pow(step.beta1, double(step.step)));
    root_ = 1 / std::sqrt(1 - std::pow(step.beta2, double(step.step)));
  }

  // Asks for what step(r) will need.
  void prefetch(int64_t r) const {
    prefetch_row(weight_ + r * dim_, dim_);
    if (step_.optimizer == RowOptimizer::adam) {
      prefetch_row(first_ + r * dim_, dim_);
      prefetch_row(second_ + r * dim_, dim_);
    } else if (first_) {
      lspm::prefetch(first_ + r);
    }
  }

  // Changes row r by its gradient g, which is room for what comes between.
  void step(int64_t r, float* g) const {
    T* const row = weight_ + r * dim_;
    if (step_.weight_decay != 0)
      for_each_vector(dim_, [&](int64_t d, auto lanes) {
        lanes.store(g + d, lanes.load(g + d) + lanes.load(row + d) * float(step_.weight_decay));
      });
    if (step_.optimizer == RowOptimizer::adam) return adam(r, row, g);
    float size = float(step_.lr);
    if (step_.optimizer == RowOptimizer::adagrad) {
      WideSum squares;
      for_each_vector(dim_, [&](int64_t d, auto lanes) {
        const F v = lanes.load(g + d);
        squares.add(d, v * v);
      });
      first_[r] += float(squares.total() / double(dim_));
      size = float(step_.lr / (std::sqrt(double(first_[r])) + step_.eps));
    }
    write(r, row, g, [&](int64_t d, auto lanes) { return lanes.load(row + d) - lanes.load(g + d) * size; });
  }

 private:
  void adam(int64_t r, T* row, float* g) const {
    float *const m = first_ + r * dim_, *const v = second_ + r * dim_;
    const float grow1 = float(1 - step_.beta1), grow2 = float(1 - step_.beta2);
    const float scale = float(scale_), root = float(root_), eps = float(step_.eps);
    write(r, row, g, [&](int64_t d, auto lanes) {
      const F gradient = lanes.load(g + d), old = lanes.load(m + d), squares = lanes.load(v + d);
      const F mean = old + (gradient - old) * grow1;
      const F square = squares + (gradient * gradient - squares) * grow2;
      lanes.store(m + d, mean);
      lanes.store(v + d, square);
      return lanes.load(row + d) - mean * scale / (sqrt(square) * root + eps);
    });
  }

  template <class Value>
  void write(int64_t r, T* row, float* g, Value value) const {
    if constexpr (std::is_same_v<T, bf16>) {
      if (step_.stochastic) {
        for_each_vector(dim_, [&](int64_t d, auto lanes) { lanes.store(g + d, value(d, lanes)); });
        return for_each_word(step_.seed, r, 0, dim_, [&](int64_t d, U word, auto lanes) {
          lanes.store(row + d, rounded_at_random(lanes.load(g + d), word));
        });
      }
    }
    for_each_vector(dim_, [&](int64_t d, auto lanes) { lanes.store(row + d, value(d, lanes)); });
  }

  T* const weight_;
  float *const first_, *const second_;
  const int64_t dim_;
  const RowStep& step_;
  double scale_ = 0, root_ = 0;
};

template <class T, class I>
void update(const Stepper<T>& stepper, const T* dout, const TypedBags<T, I>& bags, int threads) {
  const int64_t dim = bags.s.dim;
  const SortedBags<T, I> sorted(bags, threads);
  sorted.for_each_row(threads, [&](auto rows) {
    const std::unique_ptr<float[]> g(new float[dim]);
    rows([&](int64_t first) {
      const auto meet = [&](int64_t i) {
        const int64_t later = i + sorted.ahead();
        if (later < sorted.count() && sorted.row(later) != sorted.row(later - 1))
          stepper.prefetch(sorted.row(later));
      };
      const int64_t last = sorted.gradient(
          dout, first, meet, [&](int64_t d, F sums, auto lanes) { lanes.store(g.get() + d, sums); });
      stepper.step(sorted.row(first), g.get());
      return last;
    });
  });
}

}  // namespace

void embedding_bag_update(void* weight, float* first, float* second, const void* dout, const Bags& bags,
                          const EmbeddingBagShape& shape, const RowStep& step, int threads) {
  with_types(shape, [&](auto element, auto index) {
    using T = decltype(element);
    const TypedBags<T, decltype(index)> typed(bags, shape);
    typed.check(kNames[int(step.optimizer)]);
    const Stepper<T> stepper(static_cast<T*>(weight), first, second, shape.dim, step);
    if (shape.dim) update(stepper, static_cast<const T*>(dout), typed, threads);
  });
}

}  // namespace lspm::cpu
