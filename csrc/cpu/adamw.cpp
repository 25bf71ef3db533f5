// AdamW's step and the norm of gradients, over the elements of all tensors as if they were one: threads claim
// chunks of it, so many small tensors cost no more than one large one. An element is read and written once:
// 28 bytes in float32, and 4 for the norm. Nothing is streamed past the caches: each line that is written has
// been read. The step takes the chunks from the last to the first, as the norm's pass has left the end of the
// gradients in the caches.
#include "adamw.h"

#include <memory>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/random_rounding.h"
#include "cpu/sqrt.h"

namespace lspm::cpu {
namespace {

// Elements, a multiple of 64. Of 16 * 1024, one thread loses a tenth to streams of memory that begin anew.
constexpr int64_t kChunk = 64 * 1024;
// Bytes from where an array is read to where it is fetched: processors that find streams by themselves end
// them with each page. One thread takes a fifth longer without it.
constexpr int64_t kAhead = 1024;

// The chunks of a list of tensors, each a part of one of them.
class Chunks {
 public:
  template <class Tensor>
  Chunks(const Tensor* tensors, int64_t count) : firsts_(count + 1) {
    for (int64_t t = 0; t < count; ++t) {
      firsts_[t + 1] = firsts_[t] + (tensors[t].elements + kChunk - 1) / kChunk;
      elements_ += tensors[t].elements;
    }
  }
  int64_t count() const { return firsts_.back(); }
  int64_t elements() const { return elements_; }

  // Calls body(tensor, begin, end) with what chunk c is.
  template <class Tensor, class Body>
  void with(const Tensor* tensors, int64_t c, Body body) const {
    const int64_t t = std::upper_bound(firsts_.begin(), firsts_.end(), c) - firsts_.begin() - 1;
    const int64_t begin = (c - firsts_[t]) * kChunk;
    body(t, begin, std::min(begin + kChunk, tensors[t].elements));
  }

 private:
  std::vector<int64_t> firsts_;
  int64_t elements_ = 0;
};

// What the elements of one tensor are changed by.
struct Numbers {
  float scale, decay, grow1, keep2, grow2, size, root, eps;

  Numbers(const AdamwStep& s, int64_t step, float by)
      : scale(s.maximize ? -by : by),
        decay(float(s.lr * s.weight_decay)),
        grow1(float(1 - s.beta1)),
        keep2(float(s.beta2)),
        grow2(float(1 - s.beta2)),
        size(float(s.lr / (1 - std::pow(s.beta1, double(step))))),
        root(float(1 / std::sqrt(1 - std::pow(s.beta2, double(step))))),
        eps(float(s.eps)) {}
};

// The larger, or NaN where either is.
F largest(F a, F b) { return (a > b) | (a != a) ? a : b; }

// Elements of the parameter's type T and of the moments' type S. kMaster: x is master, and param its copy.
template <class T, class S, bool kMaster, bool kMax>
void update(const AdamwTensor& t, int64_t row, int64_t begin, int64_t end, const AdamwStep& step,
            const Numbers by) {
  T* const param = static_cast<T*>(t.param);
  const T* const grad = static_cast<const T*>(t.grad);
  S *const first = static_cast<S*>(t.exp_avg), *const second = static_cast<S*>(t.exp_avg_sq);
  S* const most = static_cast<S*>(t.max_exp_avg_sq);
  float* const master = t.master;
  const auto changed = [=](int64_t i, auto lanes) __attribute__((always_inline)) {
    const auto load = [&](const auto* p) __attribute__((always_inline)) {
      prefetch(p + i + kAhead / int64_t(sizeof *p));
      return lanes.load(p + i);
    };
    const F g = load(grad) * by.scale;
    const F old = load(first), mean = old + (g - old) * by.grow1;
    const F square = load(second) * by.keep2 + g * g * by.grow2;
    lanes.store(first + i, mean);
    lanes.store(second + i, square);
    F size = square;
    if constexpr (kMax) {
      size = largest(load(most), square);
      lanes.store(most + i, size);
    }
    const F x = kMaster ? load(master) : load(param);
    // x less all of its change, as x times a rounded 1 - decay would drift.
    return x - (x * by.decay + mean * by.size / (sqrt(size) * by.root + by.eps));
  };
  if constexpr (std::is_same_v<T, bf16> && !kMaster) {
    if (step.stochastic)
      return for_each_word(step.seed, row, begin, end, [=](int64_t i, U word, auto lanes) {
        lanes.store(param + i, rounded_at_random(changed(i, lanes), word));
      });
  }
  for_each_vector(end - begin, [=](int64_t i, auto lanes) {
    i += begin;
    const F x = changed(i, lanes);
    if constexpr (kMaster) lanes.store(master + i, x);
    lanes.store(param + i, x);
  });
}

template <class T, class S>
auto update_of(const AdamwTensor& t) {
  if constexpr (!std::is_same_v<T, S>)
    if (t.master) return t.max_exp_avg_sq ? &update<T, S, true, true> : &update<T, S, true, false>;
  return t.max_exp_avg_sq ? &update<T, S, false, true> : &update<T, S, false, false>;
}

auto update_of(const AdamwTensor& t, const AdamwStep& s) {
  const bool wide = s.state_dtype == DType::f32;
  if (s.dtype == DType::f32) return update_of<float, float>(t);
  if (s.dtype == DType::bf16) return wide ? update_of<bf16, float>(t) : update_of<bf16, bf16>(t);
  return wide ? update_of<f16, float>(t) : update_of<f16, f16>(t);
}

using D = double __attribute__((vector_size(2 * sizeof(F))));

// The sum of the squares of p[0] to p[n - 1], in float64 from the first addition on: no gradient is too large
// or too small.
template <class T>
double squares(const T* p, int64_t n) {
  constexpr int kParts = 4;
  D sums[kParts] = {};
  const auto add = [](D& sum, F v) __attribute__((always_inline)) {
    const D wide = __builtin_convertvector(v, D);
    sum += wide * wide;
  };
  int64_t i = 0;
  for (; i + kParts * kLanes <= n; i += kParts * kLanes)
    for (int part = 0; part < kParts; ++part) add(sums[part], load(p + i + part * kLanes));
  for_each_vector(n - i, [&](int64_t rest, auto lanes) { add(sums[0], lanes.load(p + i + rest)); });
  const D all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += all[lane];
  return total;
}

}  // namespace

void adamw_update(const AdamwTensor* tensors, int64_t count, const float* scale, const AdamwStep& step,
                  int threads) {
  const Chunks chunks(tensors, count);
  std::vector<Numbers> numbers;
  for (int64_t t = 0; t < count; ++t)
    numbers.push_back(t && tensors[t].step == tensors[t - 1].step
                          ? numbers.back()
                          : Numbers(step, tensors[t].step, scale ? *scale : 1));
  parallel_claim(chunks.count(), chunks.elements(), threads, [&](auto next, int) {
    for (int64_t c; (c = next()) < chunks.count();)
      chunks.with(tensors, chunks.count() - 1 - c, [&](int64_t t, int64_t begin, int64_t end) {
        update_of(tensors[t], step)(tensors[t], t, begin, end, step, numbers[t]);
      });
  });
}

void adamw_norm(const AdamwGrad* grads, int64_t count, DType dtype, float* norm, int threads) {
  const Chunks chunks(grads, count);
  const std::unique_ptr<double[]> parts(
      new double[chunks.count()]);  // so that their order is always the same
  const auto run = [&](auto element) {
    using T = decltype(element);
    parallel_claim(chunks.count(), chunks.elements(), threads, [&](auto next, int) {
      for (int64_t c; (c = next()) < chunks.count();)
        chunks.with(grads, c, [&](int64_t t, int64_t begin, int64_t end) {
          parts[c] = squares(static_cast<const T*>(grads[t].data) + begin, end - begin);
        });
    });
  };
  if (dtype == DType::f32)
    run(float{});
  else if (dtype == DType::bf16)
    run(bf16{});
  else
    run(f16{});
  double total = 0;
  for (int64_t c = 0; c < chunks.count(); ++c) total += parts[c];
  *norm = float(std::sqrt(total));
}

}  // namespace lspm::cpu
