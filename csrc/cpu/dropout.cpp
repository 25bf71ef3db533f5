// Dropout and a residual addition (Srivastava et al. 2014). A thread owns a range of blocks of 64 elements,
// whose words are drawn together and never stored. Bytes per element, in sizes of T: 2, with a residual 3.
#include "cpu/dropout.h"

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

template <class T>
struct Job {
  const T *x, *residual;  // residual: or null
  T* out;
  Dropper drop;

  template <bool kStream, bool kResidual>
  void range(int64_t begin, int64_t end) const {
    // Locals, as a store through a pointer may change a member as far as the compiler knows.
    const T *const x = this->x, *const residual = this->residual;
    T* const out = this->out;
    const Dropper drop = this->drop;
    constexpr int64_t kStep = kTogether * kDrawn;
    const int64_t whole = begin + (end - begin) / kStep * kStep;
    for (int64_t at = begin; at < whole; at += kStep) {
      U words[kStep / kLanes];
      draw<kTogether>(drop.seed, 0, at, words);
#pragma GCC unroll 16
      for (int v = 0; v < kStep / kLanes; v += 2) {
        constexpr PairLanes<T> lanes;
        const int64_t i = at + v * kLanes;
        F first = reinterpret_cast<F>(words[v]), second = reinterpret_cast<F>(words[v + 1]);
        if constexpr (lanes.kApart) unzip(first, second);
        Pair value = lanes.load(x + i);
        value = {drop(value.first, reinterpret_cast<U>(first)),
                 drop(value.second, reinterpret_cast<U>(second))};
        if constexpr (kResidual) value += lanes.load(residual + i);
        write<kStream>(out + i, value, lanes);
      }
    }
    for_each_word(drop.seed, 0, whole, end, [&](int64_t i, U word, auto lanes) {
      F value = drop(lanes.load(x + i), word);
      if constexpr (kResidual) value += lanes.load(residual + i);
      lanes.store(out + i, value);
    });
    if (kStream) stream_fence();
  }
};

template <class T>
void forward(const void* x, const void* residual, void* out, int64_t elements, const Drops& drops,
             int threads) {
  const Job<T> job{static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(out),
                   Dropper(drops)};
  const bool stream = streams(job.out, elements, kDrawn);
  const auto range = residual
                         ? stream ? &Job<T>::template range<true, true> : &Job<T>::template range<false, true>
                     : stream ? &Job<T>::template range<true, false>
                              : &Job<T>::template range<false, false>;
  parallel_for((elements + kDrawn - 1) / kDrawn, elements, threads, [&](int64_t begin, int64_t end) {
    (job.*range)(begin * kDrawn, std::min(end * kDrawn, elements));
  });
}

}  // namespace

void dropout_forward(const void* x, const void* residual, void* out, int64_t elements, DType dtype,
                     const Drops& drops, int threads) {
  const auto run = dtype == DType::f32 ? forward<float> : dtype == DType::bf16 ? forward<bf16> : forward<f16>;
  run(x, residual, out, elements, drops, threads);
}

}  // namespace lspm::cpu
