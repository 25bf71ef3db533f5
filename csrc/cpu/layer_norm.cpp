// Layer norm and RMS norm, with or without a residual addition (Ba, Kiros and Hinton 2016; Zhang and Sennrich
// 2019). A thread owns whole rows. A row is read from memory once, and fetched while the one before is
// computed on; it stays in the cache as floats for the mean, the variance (in two passes, so that a large
// mean cancels nothing) and the output. The backward writes dx and, for each run of rows, one partial sum of
// dweight and dbias; the runs are then added in order. Bytes per element, in sizes of T: forward 2, with a
// residual 4; backward 3, with dsum 4.
#include "layer_norm.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lspm::cpu {
namespace {

// Whether `out` is to be streamed, which it is made ready for.
template <class T>
bool streams(T* out, const LayerNormShape& s) {
  const int64_t bytes = s.rows * s.cols * int64_t(sizeof(T));
  if (!out || bytes < kLargeBytes) return false;
  prefer_huge_pages(out, bytes);
  return reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0 && s.cols % kLanes == 0;
}

template <bool kStream, class T, class Lanes>
void write(T* p, F v, Lanes lanes) {
  if constexpr (kStream)
    stream(p, v);
  else
    lanes.store(p, v);
}

template <class T, class W>
struct Forward {
  const T *x, *residual;
  const W *weight, *bias;
  T *sum, *y;
  float *mean, *rstd;
  const LayerNormShape& shape;
  float eps;

  // Rows go together while all of them fit into the first-level cache as floats: their sums then need not
  // wait for each other, and the weights are read once for all.
  static constexpr int kTogether = 4;
  static constexpr int64_t kMaxColsTogether = 2048;

  template <bool kStream>
  void rows(int64_t begin, int64_t end) const {
    std::vector<float> floats(kTogether * shape.cols);
    const auto run = [&](auto has_residual) {
      constexpr bool kResidual = decltype(has_residual)::value;
      if (shape.cols <= kMaxColsTogether)
        for (; begin + kTogether <= end; begin += kTogether)
          block<kStream, kResidual, kTogether>(begin, floats.data());
      for (; begin < end; ++begin) block<kStream, kResidual, 1>(begin, floats.data());
    };
    residual ? run(std::true_type{}) : run(std::false_type{});
    if (kStream) stream_fence();
  }

  // kRows rows from r on. `floats` is room for them as floats, where they are not that already.
  template <bool kStream, bool kResidual, int kRows>
  void block(int64_t r, float* floats) const {
    // Locals, as a store through a pointer may change a member as far as the compiler knows.
    const int64_t cols = shape.cols, at = r * cols;
    const T *const x = this->x + at, *const residual = this->residual + at;
    T *const sum = this->sum + at, *const y = this->y + at;
    const W *const weight = this->weight, *const bias = this->bias;
    float m[kRows], scale[kRows];
    for (int k = 0; k < kRows; ++k) {
      const int64_t row = k * cols;
      const float total = sum_of(cols, [&](int64_t i, auto lanes) {
        F v = lanes.load(x + row + i);
        if constexpr (kResidual) {
          v = rounded<T>(v + lanes.load(residual + row + i));
          write<kStream>(sum + row + i, v, lanes);
        }
        if constexpr (kResidual || !std::is_same_v<T, float>) lanes.store(floats + row + i, v);
        return v;
      });
      m[k] = shape.centered ? total / cols : 0.0f;
    }
    if constexpr (!kResidual && std::is_same_v<T, float>) floats = const_cast<float*>(x);  // read only
    for (int k = 0; k < kRows; ++k) {
      const float squares = sum_of(cols, [&](int64_t i, auto lanes) {
        const F d = lanes.keep(lanes.load(floats + k * cols + i) - m[k]);
        return d * d;
      });
      scale[k] = float(1.0 / std::sqrt(double(squares) / cols + eps));
      if (mean) mean[r + k] = m[k];
      if (rstd) rstd[r + k] = scale[k];
    }
    for (int k = 0; k < kRows; ++k) {
      const int64_t row = k * cols;
      for_each_vector(cols, [&](int64_t i, auto lanes) {
        F v = (lanes.load(floats + row + i) - m[k]) * scale[k];
        if (weight) v *= lanes.load(weight + i);
        if (bias) v += lanes.load(bias + i);
        write<kStream>(y + row + i, v, lanes);
        prefetch(x + row + i + kRows * cols);
        if constexpr (kResidual) prefetch(residual + row + i + kRows * cols);
      });
    }
  }
};

template <class T, class W>
struct Backward {
  const T *dy, *dsum, *sum;
  const float *mean, *rstd;
  const W* weight;
  T* dx;
  const LayerNormShape& shape;

  // dx of kRows rows from r on, and their share of dweight and dbias added to dw and db (floats, or null).
  // Rows go together because a sum over them is read and written once for all, and rounded less often.
  template <bool kStream, int kRows>
  void block(int64_t r, float* dw, float* db) const {
    const int64_t cols = shape.cols, at = r * cols;
    const T *const dy = this->dy + at, *const sum = this->sum + at;
    const T* const dsum = this->dsum ? this->dsum + at : nullptr;
    T* const dx = this->dx + at;
    const W* const weight = this->weight;
    float m[kRows], scale[kRows], g_mean[kRows], gn_mean[kRows];
    for (int k = 0; k < kRows; ++k) {
      m[k] = mean ? mean[r + k] : 0.0f;
      scale[k] = rstd[r + k];
      const int64_t row = k * cols;
      F gradients{};
      const float products = sum_of(cols, [&](int64_t i, auto lanes) {
        const F normal = lanes.keep((lanes.load(sum + row + i) - m[k]) * scale[k]);
        const F d = lanes.load(dy + row + i);
        const F g = weight ? d * lanes.load(weight + i) : d;
        gradients += g;
        if (dsum) prefetch(dsum + row + i);
        return g * normal;
      });
      g_mean[k] = shape.centered ? lspm::sum(gradients) / cols : 0.0f;
      gn_mean[k] = products / cols;
    }
    for_each_vector(cols, [&](int64_t i, auto lanes) {
      F products[kRows], gradients[kRows];
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = k * cols + i;
        const F normal = (lanes.load(sum + row) - m[k]) * scale[k];
        const F d = lanes.load(dy + row);
        const F g = weight ? d * lanes.load(weight + i) : d;
        F v = (g - g_mean[k] - normal * gn_mean[k]) * scale[k];
        if (dsum) v += lanes.load(dsum + row);
        write<kStream>(dx + row, v, lanes);
        prefetch(dy + row + kRows * cols);
        prefetch(sum + row + kRows * cols);
        products[k] = d * normal;
        gradients[k] = d;
      }
      if (dw) lanes.store(dw + i, lanes.load(dw + i) + total(products));
      if (db) lanes.store(db + i, lanes.load(db + i) + total(gradients));
    });
  }

  template <bool kStream>
  void rows(int64_t begin, int64_t end, float* dw, float* db) const {
    for (; begin + 4 <= end; begin += 4) block<kStream, 4>(begin, dw, db);
    for (; begin < end; ++begin) block<kStream, 1>(begin, dw, db);
    if (kStream) stream_fence();
  }

  static F total(const F (&v)[1]) { return v[0]; }
  static F total(const F (&v)[4]) { return (v[0] + v[1]) + (v[2] + v[3]); }
};

// total[i] = the sum of first[p * stride + i] over p in order, with the rounding errors carried along
// (Knuth's two-sum): as many terms as there are runs would otherwise cost a digit.
template <class W>
void add_runs(const float* first, int64_t stride, W* total, const LayerNormShape& s, int threads) {
  if (!total) return;
  const int64_t vectors = (s.cols + kLanes - 1) / kLanes;
  parallel_for(vectors, s.partials * s.cols, threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kLanes, to = std::min(end * kLanes, s.cols);
    for_each_vector(to - from, [&](int64_t i, auto lanes) {
      F v{}, lost{};
      for (int64_t p = 0; p < s.partials; ++p) {
        const F term = lanes.load(first + p * stride + from + i), next = v + term, seen = next - v;
        lost += (v - (next - seen)) + (term - seen);
        v = next;
      }
      lanes.store(total + from + i, v + lost);
    });
  });
}

template <class T, class W>
void forward(const void* x, const void* residual, const void* weight, const void* bias, void* sum, void* y,
             float* mean, float* rstd, const LayerNormShape& s, float eps, int threads) {
  using Job = Forward<T, W>;
  const Job job{static_cast<const T*>(x),
                static_cast<const T*>(residual),
                static_cast<const W*>(weight),
                static_cast<const W*>(bias),
                static_cast<T*>(sum),
                static_cast<T*>(y),
                mean,
                rstd,
                s,
                eps};
  const bool stream = streams(job.y, s) & (streams(job.sum, s) | !sum);
  const auto rows = stream ? &Job::template rows<true> : &Job::template rows<false>;
  // Whole blocks for every thread: a row is computed by the same code for any number of them.
  constexpr int64_t kBlock = Job::kTogether;
  parallel_for((s.rows + kBlock - 1) / kBlock, s.rows * s.cols, threads, [&](int64_t begin, int64_t end) {
    (job.*rows)(begin * kBlock, std::min(end * kBlock, s.rows));
  });
}

template <class T, class W>
void backward(const void* dy, const void* dsum, const void* sum, const float* mean, const float* rstd,
              const void* weight, void* dx, void* dweight, void* dbias, float* partial,
              const LayerNormShape& s, int threads) {
  using Job = Backward<T, W>;
  const Job job{static_cast<const T*>(dy),
                static_cast<const T*>(dsum),
                static_cast<const T*>(sum),
                mean,
                rstd,
                static_cast<const W*>(weight),
                static_cast<T*>(dx),
                s};
  const bool stream = streams(job.dx, s);
  const int64_t run = s.rows_per_partial();
  parallel_for(s.partials, s.rows * s.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float *dw = partial + 2 * p * s.cols, *db = dw + s.cols;
      std::fill(dw, db + s.cols, 0.0f);
      const int64_t from = std::min(p * run, s.rows), to = std::min(from + run, s.rows);
      const auto rows = stream ? &Job::template rows<true> : &Job::template rows<false>;
      (job.*rows)(from, to, dweight ? dw : nullptr, dbias ? db : nullptr);
    }
  });
  add_runs(partial, 2 * s.cols, static_cast<W*>(dweight), s, threads);
  add_runs(partial + s.cols, 2 * s.cols, static_cast<W*>(dbias), s, threads);
}

// Calls f(T{}, W{}) for the shape's two element types.
template <class Call>
void with_types(const LayerNormShape& s, Call f) {
  const bool wide = s.weight_dtype == DType::f32;
  if (s.dtype == DType::f32) return f(float{}, float{});
  if (s.dtype == DType::bf16) return wide ? f(bf16{}, float{}) : f(bf16{}, bf16{});
  return wide ? f(f16{}, float{}) : f(f16{}, f16{});
}

}  // namespace

void layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* sum,
                        void* y, float* mean, float* rstd, const LayerNormShape& shape, float eps,
                        int threads) {
  with_types(shape, [&](auto t, auto w) {
    forward<decltype(t), decltype(w)>(x, residual, weight, bias, sum, y, mean, rstd, shape, eps, threads);
  });
}

void layer_norm_backward(const void* dy, const void* dsum, const void* sum, const float* mean,
                         const float* rstd, const void* weight, void* dx, void* dweight, void* dbias,
                         float* partial, const LayerNormShape& shape, int threads) {
  with_types(shape, [&](auto t, auto w) {
    backward<decltype(t), decltype(w)>(dy, dsum, sum, mean, rstd, weight, dx, dweight, dbias, partial, shape,
                                       threads);
  });
}

}  // namespace lspm::cpu
