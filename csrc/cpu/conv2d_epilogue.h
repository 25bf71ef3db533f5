// What conv2d does with a tile of sums while it lies in the first-level cache.
#pragma once
#include "conv2d.h"
#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace lspm::cpu {

// The mean and the squared deviations of what a block of pixels gave for a panel of filters: sums of
// deviations from its first pixel, which cancel nothing where the mean is large. Those of a tile are added to
// what there is with their rounding errors kept (Kahan 1965).
template <class T>
class Moments {
 public:
  void add(const float* tile, int64_t rows, int64_t filters) {
    for (int64_t i = 0; i < filters; i += kLanes) {
      if (!count_) store(first_ + i, rounded<T>(load(tile + i)));
      const F first = load(first_ + i);
      F sum{}, squares{};
      for (int64_t r = 0; r < rows; ++r) {
        const F d = rounded<T>(load(tile + r * kPanel + i)) - first;
        sum += d;
        squares += d * d;
      }
      add(sum_ + i, sum);
      add(squares_ + i, squares);
    }
    count_ += rows;
  }

  // As batch_norm_act.h has a run: their number, mean and squared deviations, `apart` floats apart.
  void write(int64_t filters, float* run, int64_t apart) {
    const float count = float(count_);
    for_each_vector(filters, [&](int64_t i, auto lanes) {
      const F mean = load(sum_ + i) / count;
      lanes.store(run + i, broadcast(count));
      lanes.store(run + apart + i, load(first_ + i) + mean);
      lanes.store(run + 2 * apart + i, max(F{}, load(squares_ + i) - mean * load(sum_ + i)));
    });
    count_ = 0;
  }

 private:
  void add(float* sum, F v) const {
    const F before = count_ ? load(sum) : F{}, missing = count_ ? v - load(sum + kPanel) : v;
    const F after = before + missing;
    store(sum + kPanel, (after - before) - missing);
    store(sum, after);
  }

  alignas(64) float first_[kPanel], sum_[2 * kPanel], squares_[2 * kPanel];
  int64_t count_ = 0;
};

template <class T>
struct Epilogue {
  const float *scale, *shift;
  const T* residual;
  Activation activation;

  // Begins to bring what write() touches, while the tile is computed: rows lie far apart, which no processor
  // foresees.
  void prefetch(int64_t rows, int64_t filters, const T* y, int64_t out, int64_t pixel) const {
    for (int64_t r = 0; r < rows; ++r, out += pixel)
      for (int64_t i = 0; i < filters; i += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(y + out + i, 1);
        if (residual) __builtin_prefetch(residual + out + i);
      }
  }

  // Rows of a tile, which begin with filter `filter`, into pixels from `out` on of y. The tile is left as
  // what y has.
  void write(float* tile, int64_t rows, int64_t filters, int64_t filter, T* y, int64_t out,
             int64_t pixel) const {
    with_activation(activation, [&](auto kind) {
      for (int64_t r = 0; r < rows; ++r, tile += kPanel, out += pixel)
        for_each_vector(filters, [&](int64_t i, auto lanes) {
          F v = load(tile + i);
          if (scale) v *= lanes.load(scale + filter + i);
          if (shift) v += lanes.load(shift + filter + i);
          if (residual) v += lanes.load(residual + out + i);
          v = activated<kind.value>(v);
          store(tile + i, v);
          lanes.store(y + out + i, v);
        });
    });
  }
};

}  // namespace lspm::cpu
