// A gated linear unit. A thread owns whole rows, or any range of elements where the rows of gate and up lie
// one behind the other; each is read once. Bytes per element, in sizes of T: forward 3; backward 5, with y 6.
#include "swiglu.h"

#include <algorithm>
#include <initializer_list>

#include "cpu/activation.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kUnit = 2 * kLanes;  // elements of a pair of vectors

template <class T>
struct Tensor {
  T* data;
  int64_t stride;

  explicit Tensor(const Rows& rows) : data(static_cast<T*>(rows.data)), stride(rows.stride) {}
  Tensor(const void* data, int64_t cols) : data(static_cast<T*>(const_cast<void*>(data))), stride(cols) {}
  // Whether the rows, an output, are to be streamed; makes them ready.
  bool streams(const SwigluShape& s) const {
    const int64_t spanned = (s.rows - 1) * stride + s.cols;
    return cpu::streams(data, spanned, s.cols) && stride % kUnit == 0;
  }
};

template <class T, Activation kActivation>
struct Job {
  static constexpr int64_t kAhead = 2048 / sizeof(T);

  Tensor<T> dy, gate, up, dgate, dup, y;

  // n elements from column `at` of row r on.
  template <bool kStream>
  void forward(int64_t r, int64_t at, int64_t n) const {
    const T* const gate = this->gate.data + r * this->gate.stride + at;
    const T* const up = this->up.data + r * this->up.stride + at;
    T* const y = this->y.data + r * this->y.stride + at;
    for_each_pair<T>(0, n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const auto z = lanes.load(gate + i), u = lanes.load(up + i);
      fetch(gate + i, kAhead);
      fetch(up + i, kAhead);
      write<kStream>(y + i, activated<kActivation, T>(z) * u, lanes);
    });
  }

  template <bool kStream>
  void backward(int64_t r, int64_t at, int64_t n) const {
    const T* const dy = this->dy.data + r * this->dy.stride + at;
    const T* const gate = this->gate.data + r * this->gate.stride + at;
    const T* const up = this->up.data + r * this->up.stride + at;
    T* const dgate = this->dgate.data + r * this->dgate.stride + at;
    T* const dup = this->dup.data + r * this->dup.stride + at;
    T* const y = this->y.data ? this->y.data + r * this->y.stride + at : nullptr;
    for_each_pair<T>(0, n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const auto g = lanes.load(dy + i), z = lanes.load(gate + i), u = lanes.load(up + i);
      fetch(dy + i, kAhead);
      fetch(gate + i, kAhead);
      fetch(up + i, kAhead);
      const auto a = activated<kActivation, T>(z);
      write<kStream>(dgate + i, through<kActivation, T>(g * u, z), lanes);
      write<kStream>(dup + i, g * a, lanes);
      if (y) write<kStream>(y + i, a * u, lanes);
    });
  }
};

// Calls body(r, at, n) for rows, or for one piece of all elements to a thread where no row lies apart.
template <class Body>
void for_pieces(const SwigluShape& s, bool apart, bool stream, int threads, Body body) {
  const int64_t elements = s.rows * s.cols;
  if (apart)
    return parallel_for(s.rows, elements, threads, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) body(begin, 0, s.cols);
      if (stream) stream_fence();
    });
  parallel_for((elements + kUnit - 1) / kUnit, elements, threads, [&](int64_t begin, int64_t end) {
    body(0, begin * kUnit, std::min(end * kUnit, elements) - begin * kUnit);
    if (stream) stream_fence();
  });
}

// Calls f(T{}, activation) for the shape's element type and activation.
template <class Call>
void with_kernel(const SwigluShape& s, Call f) {
  using A = Activation;
  with_one_of<A::silu, A::gelu, A::gelu_tanh>(s.activation, [&](auto a) {
    if (s.dtype == DType::f32) return f(float{}, a);
    return s.dtype == DType::bf16 ? f(bf16{}, a) : f(f16{}, a);
  });
}

bool apart(const SwigluShape& s, std::initializer_list<int64_t> strides) {
  return s.rows > 1 && std::any_of(strides.begin(), strides.end(), [&](int64_t n) { return n != s.cols; });
}

}  // namespace

void swiglu_forward(const Rows& gate, const Rows& up, void* y, const SwigluShape& s, int threads) {
  with_kernel(s, [&](auto t, auto a) {
    using T = decltype(t);
    const Tensor<T> none(nullptr, 0), out(y, s.cols);
    const Job<T, a.value> job{none, Tensor<T>(gate), Tensor<T>(up), none, none, out};
    const bool stream = out.streams(s);
    for_pieces(s, apart(s, {gate.stride, up.stride}), stream, threads, [&](int64_t r, int64_t at, int64_t n) {
      stream ? job.template forward<true>(r, at, n) : job.template forward<false>(r, at, n);
    });
  });
}

void swiglu_backward(const void* dy, const Rows& gate, const Rows& up, const Rows& dgate, const Rows& dup,
                     void* y, const SwigluShape& s, int threads) {
  with_kernel(s, [&](auto t, auto a) {
    using T = decltype(t);
    const Job<T, a.value> job{Tensor<T>(dy, s.cols), Tensor<T>(gate), Tensor<T>(up),
                              Tensor<T>(dgate),      Tensor<T>(dup),  Tensor<T>(y, s.cols)};
    const bool stream = job.dgate.streams(s) & job.dup.streams(s) & (job.y.streams(s) | !y);
    const bool rows = apart(s, {gate.stride, up.stride, dgate.stride, dup.stride});
    for_pieces(s, rows, stream, threads, [&](int64_t r, int64_t at, int64_t n) {
      stream ? job.template backward<true>(r, at, n) : job.template backward<false>(r, at, n);
    });
  });
}

}  // namespace lspm::cpu
