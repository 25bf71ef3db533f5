// A bias and an activation. A thread owns whole rows, or without a bias any range of elements; each is read
// once, and some 2 KiB ahead of it is fetched. The backward of a bias takes two rows at a time, so that the
// sum of a run of rows, which stays in the first-level cache, is read and written half as often; the runs are
// then added in order. Bytes per element, in sizes of T: forward 2; backward 3, with y 4.
#include "bias_act.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/runs.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kUnit = 2 * kLanes;  // elements of a pair of vectors

// Activations are as precise as the wider of T and the bias's W: dbias is a sum of unrounded dx.
template <class T, class W, Activation kActivation>
struct Job {
  using P = std::conditional_t<sizeof(W) == sizeof(float), float, T>;
  static constexpr int64_t kAhead = 2048 / sizeof(T);

  const T *dy, *x;
  T *dx, *y;  // dx, dy: null in the forward; y: or null in the backward

  // n elements from `at` on; the bias of these is at `bias`, or null.
  template <bool kStream>
  void forward(int64_t at, int64_t n, const float* bias) const {
    const T* const x = this->x + at;
    T* const y = this->y + at;
    const auto body = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      auto z = lanes.load(x + i);
      if (bias) z += lanes.load(bias + i);
      fetch(x + i, kAhead);
      write<kStream>(y + i, activated<kActivation, P>(z), lanes);
    };
    if constexpr (kStream) {
      const int64_t left = for_each_whole_pair<T>(0, n, body);
      if (left < n) forward<false>(at + left, n - left, nullptr);
    } else {
      for_each_pair<T>(0, n, body);
    }
  }

  // The same of kRows rows of n elements, one after the other. What is fetched lies as far behind these rows.
  // sums, or null: where the rows' dx is added.
  template <bool kStream, int kRows>
  void backward(int64_t at, int64_t n, const float* bias, float* sums) const {
    const T *const dy = this->dy + at, *const x = this->x + at;
    T *const dx = this->dx + at, *const y = this->y ? this->y + at : nullptr;
    const int64_t ahead = kRows == 1 ? kAhead : std::max(kAhead, kRows * n);
    const auto body = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      decltype(lanes.load(x)) b{}, total{};
      if (bias) b = lanes.load(bias + i);
#pragma GCC unroll 2
      for (int k = 0; k < kRows; ++k) {
        const int64_t j = k * n + i;
        const auto z = lanes.load(x + j) + b;
        fetch(x + j, ahead);
        const auto v = through<kActivation, P>(lanes.load(dy + j), z);
        fetch(dy + j, ahead);
        write<kStream>(dx + j, v, lanes);
        if (y) write<kStream>(y + j, activated<kActivation, P>(z), lanes);
        total = k ? total + v : v;
      }
      if (sums) lanes.store(sums + i, lanes.load(sums + i) + total);
    };
    if constexpr (kStream) {
      const int64_t left = for_each_whole_pair<T>(0, n, body);
      if (left < n) backward<false, 1>(at + left, n - left, nullptr, nullptr);
    } else {
      for_each_pair<T>(0, n, body);
    }
  }

  template <bool kStream>
  void rows(int64_t begin, int64_t end, int64_t cols, const float* bias, float* sums) const {
    for (; begin + 2 <= end; begin += 2) backward<kStream, 2>(begin * cols, cols, bias, sums);
    if (begin < end) backward<kStream, 1>(begin * cols, cols, bias, sums);
  }
};

// Calls body(at, n, bias) for pieces of the tensor: without a bias one to a thread, else its rows.
template <class T, class W, class Body>
void for_pieces(const W* bias, const BiasActShape& s, bool stream, int threads, Body body) {
  const int64_t elements = s.rows * s.cols;
  if (!bias)
    return parallel_for((elements + kUnit - 1) / kUnit, elements, threads, [&](int64_t begin, int64_t end) {
      body(begin * kUnit, std::min(end * kUnit, elements) - begin * kUnit, nullptr);
      if (stream) stream_fence();
    });
  parallel_for(s.rows, elements, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[s.cols]);
    const float* const known = ordered<T>(bias, s.cols, room.get());
    for (; begin < end; ++begin) body(begin * s.cols, s.cols, known);
    if (stream) stream_fence();
  });
}

template <class T, class W, Activation kActivation>
void forward(const void* x, const void* bias, void* y, const BiasActShape& s, int threads) {
  const Job<T, W, kActivation> job{nullptr, static_cast<const T*>(x), nullptr, static_cast<T*>(y)};
  const bool stream = streams(job.y, s.rows * s.cols, bias ? s.cols : kUnit);
  for_pieces<T>(
      static_cast<const W*>(bias), s, stream, threads, [&](int64_t at, int64_t n, const float* known) {
        stream ? job.template forward<true>(at, n, known) : job.template forward<false>(at, n, known);
      });
}

template <class T, class W, Activation kActivation>
void backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias, void* y, float* partial,
              const BiasActShape& s, int threads) {
  const Job<T, W, kActivation> job{static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx),
                                   static_cast<T*>(y)};
  const int64_t elements = s.rows * s.cols, run = s.rows_per_partial(), whole = bias ? s.cols : kUnit;
  const bool stream = streams(job.dx, elements, whole) & (streams(job.y, elements, whole) | !y);
  const W* const weights = static_cast<const W*>(bias);
  if (!dbias)
    return for_pieces<T>(weights, s, stream, threads, [&](int64_t at, int64_t n, const float* known) {
      stream ? job.template backward<true, 1>(at, n, known, nullptr)
             : job.template backward<false, 1>(at, n, known, nullptr);
    });
  parallel_for(s.partials, elements, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[s.cols]);
    const float* const known = ordered<T>(weights, s.cols, room.get());
    for (int64_t p = begin; p < end; ++p) {
      float* const sums = partial + p * s.cols;
      std::fill(sums, sums + s.cols, 0.0f);
      const int64_t from = std::min(p * run, s.rows), to = std::min(from + run, s.rows);
      stream ? job.template rows<true>(from, to, s.cols, known, sums)
             : job.template rows<false>(from, to, s.cols, known, sums);
    }
    if (stream) stream_fence();
  });
  add_runs<T>(partial, s.partials, s.cols, static_cast<W*>(dbias), s.cols, threads);
}

// Calls f(T{}, W{}, activation) for the shape's two element types and its activation.
template <class Call>
void with_types(const BiasActShape& s, Call f) {
  using A = Activation;
  with_one_of<A::relu, A::silu, A::gelu, A::gelu_tanh>(s.activation, [&](auto a) {
    const bool wide = s.bias_dtype == DType::f32;
    if (s.dtype == DType::f32) return f(float{}, float{}, a);
    if (s.dtype == DType::bf16) return wide ? f(bf16{}, float{}, a) : f(bf16{}, bf16{}, a);
    return wide ? f(f16{}, float{}, a) : f(f16{}, f16{}, a);
  });
}

}  // namespace

void bias_act_forward(const void* x, const void* bias, void* y, const BiasActShape& shape, int threads) {
  with_types(shape, [&](auto t, auto w, auto a) {
    forward<decltype(t), decltype(w), a.value>(x, bias, y, shape, threads);
  });
}

void bias_act_backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias, void* y,
                       float* partial, const BiasActShape& shape, int threads) {
  with_types(shape, [&](auto t, auto w, auto a) {
    backward<decltype(t), decltype(w), a.value>(dy, x, bias, dx, dbias, y, partial, shape, threads);
  });
}

}  // namespace lspm::cpu
