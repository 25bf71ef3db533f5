// Two-dimensional convolution by implicit GEMM, with its epilogue, and the gradient of its input.
//
// A thread owns rows of the grid and some panels of filters. It copies what its rows read of the input into
// scratch, once for all panels, and computes a tile of kTileRows pixels x kPanel filters in registers over
// the whole depth, taps and channels; the epilogue is applied while the tile lies in the first-level cache.
// So memory sees the input, the weight, the output and a residual once each.
//
// The gradient of x is the same sum over dz: for a stride of s, pixels of x whose place is alike modulo s
// share the taps that reach them, so that it is s^2 correlations of stride 1, each with its part of the taps.
#include "conv2d.h"

#include "batch_norm_act.h"
#include "cpu/activation.h"
#include "cpu/conv2d_tiles.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

template <class O, class T>
O operand(T v) {
  if constexpr (std::is_same_v<O, T>)
    return v;
  else
    return to_float(v);
}

// The weights of a panel of filters, [tap][depth][kPanel], as tiles read them.
template <class T, class O>
void pack_panel(const Window<O>& w, const T* weight, int64_t filters, O* to) {
  const Correlation& c = w.c;
  constexpr int64_t kPairs = Step<O>::kDepth;
  for (const Tap& tap : c.taps) {
    const T* from = weight + tap.filter;
    const int64_t at = (&tap - c.taps.data()) * w.tap_depth;
    if (at % kPairs == 0 && c.filter_stride == 1) {
      pack_right(from, c.depth_stride, to + at * kPanel, 0, c.depth, filters);
    } else if (at % kPairs == 0 && c.depth_stride == 1) {
      pack_right_transposed(from, c.filter_stride, to + at * kPanel, 0, c.depth, filters);
    } else {
      for (int64_t d = 0; d < c.depth; ++d) {
        O* row = to + (at + d) / kPairs * kPairs * kPanel + (at + d) % kPairs;
        for (int64_t n = 0; n < filters; ++n)
          row[n * kPairs] = operand<O>(from[d * c.depth_stride + n * c.filter_stride]);
      }
    }
  }
}

template <class T, class O>
void pack_weight(const Window<O>& w, const T* weight, O* packed, int threads) {
  const Correlation& c = w.c;
  const int64_t panels = c.groups * w.panels();
  parallel_for(panels, panels * w.panel(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % w.panels() * kPanel;
      std::fill_n(packed + i * w.panel(), w.panel(), O{});
      pack_panel(w, weight + i / w.panels() * c.group_stride + first * c.filter_stride,
                 std::min(kPanel, c.filters - first), packed + i * w.panel());
    }
  });
}

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

constexpr int64_t kWindowBytes = 384 << 10;  // of the input's copy: it and a panel fit the second-level cache
constexpr int64_t kItems = 8;                // at least, where there are so many, for threads to share

// Blocks of rows, counted through all images. Only where points are gathered may one hold several images'.
struct Blocks {
  int64_t rows, per, span, count;  // rows in a block; blocks in `span` rows, and in all

  template <class O>
  explicit Blocks(const Window<O>& w) {
    const Correlation& c = w.c;
    span = w.kind == Window<O>::gathered ? c.batch * c.rows : c.rows;
    const int64_t fits = kWindowBytes / int64_t(sizeof(O)) / std::max<int64_t>(1, w.size(1));
    rows = std::clamp<int64_t>(fits, 1, span);
    per = (span + rows - 1) / rows;
    count = per * (c.batch * c.rows / span);
  }
  int64_t begin(int64_t block) const { return block / per * span + block % per * rows; }
  int64_t end(int64_t block) const { return std::min(begin(block) + rows, (block / per + 1) * span); }
};

// The output of one block of a group: a panel of filters.
template <class T, class O>
void panel_of_block(const Window<O>& w, const O* window, const O* right, int64_t first, int64_t rows,
                    int64_t filter, int64_t filters, const Epilogue<T>& epilogue, T* y, Moments<T>* moments) {
  const Correlation& c = w.c;
  const bool flat = w.kind == Window<O>::gathered && c.dense();
  const int64_t segments = flat ? 1 : rows, pixels = flat ? rows * c.columns : c.columns;
  const int64_t tiles = (pixels + kConvRows<O> - 1) / kConvRows<O>;
  alignas(64) float tile[kConvRows<O> * kPanel];
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t row = first + s;
    const int64_t out = c.out_offset + row / c.rows * c.out_image + row % c.rows * c.out_row + filter;
    for (int64_t t = 0; t < tiles; ++t) {  // of pixels that differ by one at most
      const int64_t from = pixels * t / tiles, count = pixels * (t + 1) / tiles - from;
      multiply_runs<false>(window + s * w.row_stride() + from * w.pixel_stride(), w.pixel_stride(), w.runs,
                           w.depth, right, tile, count, filters, false);
      epilogue.write(tile, count, filters, filter, y, out + from * c.out_pixel, c.out_pixel);
      if (moments) moments->add(tile, count, filters);
    }
  }
}

// statistics: (2, filters), the mean and variance of each filter over all pixels, or null.
template <class T>
void correlate(const Correlation& c, const T* x, const T* weight, const Epilogue<T>& epilogue, T* y,
               float* statistics, int threads) {
  using O = OperandOf<T>;
  const Window<O> w(c);
  const Blocks blocks(w);
  const Room<O> packed(c.groups * w.panels() * w.panel());
  pack_weight(w, weight, packed.get(), threads);
  const int64_t chunks = std::clamp<int64_t>(kItems / (blocks.count * c.groups), 1, w.panels());
  const int64_t items = blocks.count * c.groups * chunks, room = w.size(blocks.rows);
  const int64_t all = c.groups * c.filters;
  const Room<O> windows(threads * room);
  const Room<float> runs(statistics ? blocks.count * 3 * all : 0);
  const int64_t work = c.grid() * all * std::max<int64_t>(1, c.taps.size() * c.depth);
  parallel_claim(items, work, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    Moments<T> moments;
    O* window = windows.get() + thread * room;
    for (int64_t item; (item = next()) < items;) {
      const int64_t chunk = item % chunks, group = item / chunks % c.groups, block = item / chunks / c.groups;
      const int64_t first = blocks.begin(block), rows = blocks.end(block) - first;
      w.fill(x, group, first, rows, window);
      for (int64_t p = w.panels() * chunk / chunks; p < w.panels() * (chunk + 1) / chunks; ++p) {
        const int64_t filters = std::min(kPanel, c.filters - p * kPanel);
        const int64_t filter = group * c.filters + p * kPanel;
        panel_of_block(w, window, packed.get() + (group * w.panels() + p) * w.panel(), first, rows, filter,
                       filters, epilogue, y, statistics ? &moments : nullptr);
        if (statistics) moments.write(filters, runs.get() + block * 3 * all + filter, all);
      }
    }
  });
  if (statistics)
    batch_norm_act_statistics(nullptr, runs.get(), statistics, statistics + all,
                              {c.grid(), all, blocks.count, DType::f32, Activation::none, 0.0f}, threads);
}

template <class T>
void forward(const T* x, const T* weight, const Conv2dEpilogue& e, T* y, float* statistics,
             const Conv2dShape& s, int threads) {
  correlate(sums_over_x(s), x, weight,
            Epilogue<T>{e.scale, e.shift, static_cast<const T*>(e.residual), e.activation}, y, statistics,
            threads);
}

// Pixels of x in rows i, i + stride_h, ... and columns j, j + stride_w, ...
template <class T>
void backward_phase(const T* dz, const T* weight, T* dx, const Conv2dShape& s, int64_t i, int64_t j,
                    int threads) {
  Correlation c{s.batch,
                s.out_height,
                s.out_width,
                s.filters,
                (s.height - i + s.stride_h - 1) / s.stride_h,
                (s.width - j + s.stride_w - 1) / s.stride_w,
                1,
                1,
                s.groups,
                s.group_filters(),
                s.group_channels(),
                s.group_filters() * s.weight_strides[0],
                s.weight_strides[0],
                s.weight_strides[1],
                (i * s.width + j) * s.channels,
                s.height * s.width * s.channels,
                s.stride_h * s.width * s.channels,
                s.stride_w * s.channels,
                {}};
  for (int64_t r = 0; r < s.kernel_h; ++r)
    for (int64_t q = 0; q < s.kernel_w; ++q) {
      const int64_t row = i + s.padding_h - r * s.dilation_h, column = j + s.padding_w - q * s.dilation_w;
      if (row % s.stride_h == 0 && column % s.stride_w == 0)
        c.taps.push_back(
            {row / s.stride_h, column / s.stride_w, r * s.weight_strides[2] + q * s.weight_strides[3]});
    }
  if (c.grid())
    correlate(c, dz, weight, Epilogue<T>{nullptr, nullptr, nullptr, Activation::none}, dx, nullptr, threads);
}

template <class T>
void backward_data(const T* dz, const T* weight, T* dx, const Conv2dShape& s, int threads) {
  for (int64_t i = 0; i < std::min(s.stride_h, s.height); ++i)
    for (int64_t j = 0; j < std::min(s.stride_w, s.width); ++j)
      backward_phase(dz, weight, dx, s, i, j, threads);
}

// Calls f(T{}) with the type of the tensors.
template <class Call>
void with_type(const Conv2dShape& s, Call f) {
  if (s.dtype == DType::f32) return f(float{});
  return s.dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

}  // namespace

void conv2d_forward(const void* x, const void* weight, const Conv2dEpilogue& epilogue, void* y,
                    float* statistics, const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    prepare_output(static_cast<T*>(y), s.batch * s.out_height * s.out_width * s.filters);
    forward(static_cast<const T*>(x), static_cast<const T*>(weight), epilogue, static_cast<T*>(y), statistics,
            s, threads);
  });
}

void conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight,
                     const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(dz);
    prepare_output(static_cast<T*>(dx), s.batch * s.height * s.width * s.channels);
    if (dx) backward_data(from, static_cast<const T*>(weight), static_cast<T*>(dx), s, threads);
    if (dweight) conv2d_backward_weight(from, static_cast<const T*>(x), static_cast<T*>(dweight), s, threads);
  });
}

}  // namespace lspm::cpu
