// Layer norm and RMS norm, with or without a residual addition (Ba, Kiros and Hinton 2016; Zhang and Sennrich
// 2019). A thread owns whole rows. A row is read from memory once, fetched while the ones before are computed
// on, and stays in the cache for its output. The backward writes dx and, for each run of rows, one partial
// sum of dweight and dbias; the runs are then added in order. Bytes per element, in sizes of T: forward 2,
// with a residual 4; backward 3, with dsum 4.
#include "layer_norm.h"

#include <cmath>
#include <memory>
#include <type_traits>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/row_statistics.h"
#include "cpu/runs.h"

namespace lspm::cpu {
namespace {

template <class T>
struct Forward {
  const T *x, *residual;
  T *sum, *y;
  float *mean, *rstd;
  const LayerNormShape& shape;
  float eps;

  struct Scratch {
    const float *weight, *bias;  // as ordered() has them
    T* sums;                     // the row, where it is a sum
    float* centers;              // of RowStatistics
  };

  template <bool kStream>
  void rows(int64_t begin, int64_t end, const Scratch& w) const {
    for (; begin < end; ++begin) residual ? row<kStream, true>(begin, w) : row<kStream, false>(begin, w);
    if (kStream) stream_fence();
  }

  // Each of the two passes over a row fetches half of the row after the next.
  template <bool kStream, bool kResidual>
  void row(int64_t r, const Scratch& w) const {
    // Locals, as a store through a pointer may change a member as far as the compiler knows.
    const int64_t cols = shape.cols, at = r * cols;
    const T *const x = this->x + at, *const residual = kResidual ? this->residual + at : nullptr;
    T *const sum = kResidual ? this->sum + at : nullptr, *const y = this->y + at, *const sums = w.sums;
    const float *const weight = w.weight, *const bias = w.bias;
    const auto fetch = [&](int64_t pass, int64_t done) {
      const int64_t next = 2 * cols + (pass * cols + done) / 2;
      prefetch(x + next);
      if constexpr (kResidual) prefetch(residual + next);
    };
    const RowStatistics<T> seen(cols, shape.centered, w.centers, [&](int64_t i, auto lanes) {
      auto v = lanes.load(x + i);
      if constexpr (kResidual) {
        v = lanes.rounded(v + lanes.load(residual + i));
        write<kStream>(sum + i, v, lanes);
        lanes.store(sums + i, v);
      }
      fetch(0, i);
      return v;
    });
    const float m = shape.centered ? seen.mean() : 0.0f;
    const float scale = float(1.0 / std::sqrt(double(seen.squares(m)) / cols + eps));
    if (mean) mean[r] = m;
    if (rstd) rstd[r] = scale;
    const T* const values = kResidual ? sums : x;
    for_each_pair<T>(0, cols, [&](int64_t i, auto lanes) {
      auto v = (lanes.load(values + i) - m) * scale;
      if (weight) v *= lanes.load(weight + i);
      if (bias) v += lanes.load(bias + i);
      write<kStream>(y + i, v, lanes);
      fetch(1, i);
    });
  }
};

template <class T>
struct Backward {
  const T *dy, *dsum, *sum;
  const float *mean, *rstd;
  T* dx;
  const LayerNormShape& shape;

  // dx of kRows rows from r on, and their share of dweight and dbias added to dw and db (floats in the order
  // of pairs of T, or null). Rows go together because a sum over them is read and written once for all, and
  // rounded less often. Each of the two passes over the rows fetches half of those that come next.
  template <bool kStream, int kRows>
  void block(int64_t r, const float* weight, float* dw, float* db) const {
    const int64_t cols = shape.cols, at = r * cols;
    const T *const dy = this->dy + at, *const sum = this->sum + at;
    const T* const dsum = this->dsum ? this->dsum + at : nullptr;
    T* const dx = this->dx + at;
    float m[kRows], scale[kRows], g_mean[kRows], gn_mean[kRows];
    const auto fetch = [&](int64_t pass, int64_t done) {
      const int64_t next = (kRows * (2 + pass) * cols + done) / 2;
      prefetch(dy + next);
      prefetch(sum + next);
      if (dsum) prefetch(dsum + next);
    };
    for (int k = 0; k < kRows; ++k) {
      m[k] = mean ? mean[r + k] : 0.0f;
      scale[k] = rstd[r + k];
      const int64_t row = k * cols;
      F gradients{}, products{};
      for_each_pair<T>(0, cols, [&](int64_t i, auto lanes) {
        const auto normal = lanes.keep((lanes.load(sum + row + i) - m[k]) * scale[k]);
        auto g = lanes.load(dy + row + i);
        if (weight) g *= lanes.load(weight + i);
        gradients += joined(g);
        products += joined(g * normal);
        fetch(0, row + i);
      });
      g_mean[k] = shape.centered ? lspm::sum(gradients) / cols : 0.0f;
      gn_mean[k] = lspm::sum(products) / cols;
    }
    for_each_pair<T>(0, cols, [&](int64_t i, auto lanes) {
      decltype(lanes.load(dy)) products[kRows], gradients[kRows];
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = k * cols + i;
        const auto normal = (lanes.load(sum + row) - m[k]) * scale[k];
        const auto d = lanes.load(dy + row);
        auto g = d;
        if (weight) g *= lanes.load(weight + i);
        auto v = (g - g_mean[k] - normal * gn_mean[k]) * scale[k];
        if (dsum) v += lanes.load(dsum + row);
        write<kStream>(dx + row, v, lanes);
        fetch(1, i * kRows + k * 2 * kLanes);
        products[k] = d * normal;
        gradients[k] = d;
      }
      if (dw) lanes.store(dw + i, lanes.load(dw + i) + total(products));
      if (db) lanes.store(db + i, lanes.load(db + i) + total(gradients));
    });
  }

  template <bool kStream>
  void rows(int64_t begin, int64_t end, const float* weight, float* dw, float* db) const {
    for (; begin + 4 <= end; begin += 4) block<kStream, 4>(begin, weight, dw, db);
    for (; begin < end; ++begin) block<kStream, 1>(begin, weight, dw, db);
    if (kStream) stream_fence();
  }

  template <class V>
  static V total(const V (&v)[1]) {
    return v[0];
  }
  template <class V>
  static V total(const V (&v)[4]) {
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
};

template <class T, class W>
void forward(const void* x, const void* residual, const void* weight, const void* bias, void* sum, void* y,
             float* mean, float* rstd, const LayerNormShape& s, float eps, int threads) {
  using Job = Forward<T>;
  const Job job{static_cast<const T*>(x),
                static_cast<const T*>(residual),
                static_cast<T*>(sum),
                static_cast<T*>(y),
                mean,
                rstd,
                s,
                eps};
  const int64_t elements = s.rows * s.cols;
  const bool stream = streams(job.y, elements, s.cols) & (streams(job.sum, elements, s.cols) | !sum);
  const auto rows = stream ? &Job::template rows<true> : &Job::template rows<false>;
  parallel_for(s.rows, elements, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> floats(new float[2 * s.cols + RowStatistics<T>::room(s.cols)]);
    const std::unique_ptr<T[]> sums(residual ? new T[s.cols] : nullptr);
    float *const first = floats.get(), *const second = first + s.cols;
    (job.*rows)(begin, end,
                {ordered<T>(static_cast<const W*>(weight), s.cols, first),
                 ordered<T>(static_cast<const W*>(bias), s.cols, second), sums.get(), second + s.cols});
  });
}

template <class T, class W>
void backward(const void* dy, const void* dsum, const void* sum, const float* mean, const float* rstd,
              const void* weight, void* dx, void* dweight, void* dbias, float* partial,
              const LayerNormShape& s, int threads) {
  using Job = Backward<T>;
  const Job job{static_cast<const T*>(dy),
                static_cast<const T*>(dsum),
                static_cast<const T*>(sum),
                mean,
                rstd,
                static_cast<T*>(dx),
                s};
  const bool stream = streams(job.dx, s.rows * s.cols, s.cols);
  const int64_t run = s.rows_per_partial();
  parallel_for(s.partials, s.rows * s.cols, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[s.cols]);
    const float* const weights = ordered<T>(static_cast<const W*>(weight), s.cols, room.get());
    for (int64_t p = begin; p < end; ++p) {
      float *dw = partial + 2 * p * s.cols, *db = dw + s.cols;
      std::fill(dw, db + s.cols, 0.0f);
      const int64_t from = std::min(p * run, s.rows), to = std::min(from + run, s.rows);
      const auto rows = stream ? &Job::template rows<true> : &Job::template rows<false>;
      (job.*rows)(from, to, weights, dweight ? dw : nullptr, dbias ? db : nullptr);
    }
  });
  add_runs<T>(partial, s.partials, 2 * s.cols, static_cast<W*>(dweight), s.cols, threads);
  add_runs<T>(partial + s.cols, s.partials, 2 * s.cols, static_cast<W*>(dbias), s.cols, threads);
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
