// Two-dimensional convolution by implicit GEMM, with its epilogue, and the gradient of its input.
//
// A thread owns rows of the grid and some panels of filters. It copies what its rows read of the input into
// scratch, once for all panels, and computes a tile of kTileRows pixels x kPanel filters in registers over
// the whole depth, taps and channels; the epilogue is applied while the tile lies in the first-level cache.
// So memory sees the input, the weight, the output and a residual once each.
// 1x1 windows need no copy, and 3x3 ones in float go by conv2d_winograd.h where that admits them.
//
// The gradient of x is the same sum over dz: for a stride of s, pixels of x whose place is alike modulo s
// share the taps that reach them, so that it is s^2 correlations of stride 1, each with its part of the taps.
#include "conv2d.h"

#include "batch_norm_act.h"
#include "cpu/conv2d_depthwise.h"
#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_tiles.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kWindowBytes = 384 << 10;  // of the input's copy: it and a panel fit the second-level cache
constexpr int64_t kItems = 8;                // at least, where there are so many, for threads to share

// The definition, by implicit GEMM; as Winograd, which is the other way, it works on blocks of the output.
template <class T>
class ImplicitGemm {
  using O = OperandOf<T>;

 public:
  explicit ImplicitGemm(const Correlation& correlation) : c(correlation), w_(c) {
    // Rows are counted through all images; only where points are gathered may a block hold several images'.
    span_ = w_.kind == Window<O>::gathered ? c.batch * c.rows : c.rows;
    const int64_t fits = kWindowBytes / int64_t(sizeof(O)) / std::max<int64_t>(1, w_.size(1));
    rows_ = std::clamp<int64_t>(fits, 1, std::max<int64_t>(1, span_));
    in_span_ = (span_ + rows_ - 1) / rows_;
    // Without a window the images' pixels are read where they lie; unless they are a multiple of so many
    // bytes apart that rows of a tile share one set of the cache.
    const bool one_to_one = c.taps.size() == 1 && c.taps[0].row == 0 && c.taps[0].column == 0 &&
                            c.stride_h == 1 && c.stride_w == 1 && c.rows == c.height && c.columns == c.width;
    direct_ = std::is_same_v<T, O> && kRunDepth<O> <= 2 && one_to_one && c.depth % kRunDepth<O> == 0 &&
              c.channels * int64_t(sizeof(T)) % 4096 != 0;
    pixel_ = direct_ ? c.channels : w_.pixel_stride();
    row_ = direct_ ? c.columns * c.channels : w_.row_stride();
  }

  int64_t blocks() const { return span_ ? in_span_ * (c.batch * c.rows / span_) : 0; }
  int64_t panels() const { return w_.panels(); }
  int64_t panel() const { return w_.panel(); }
  int64_t room() const { return w_.size(rows_); }

  void pack(const T* weight, int64_t filters, O* to) const {
    std::fill_n(to, panel(), O{});
    pack_panel(w_, weight, filters, to);
  }

  // What the block reads, which may be written to `room`.
  const O* operands(const T* x, int64_t group, int64_t block, O* room) const {
    if constexpr (std::is_same_v<T, O>)
      if (direct_) return x + group * c.depth + begin(block) * row_;
    w_.fill(x, group, begin(block), end(block) - begin(block), room);
    return room;
  }

  bool panel_of_block(const O* operands, O*, const O* right, int64_t block, int64_t filter, int64_t filters,
                      const Epilogue<T>& epilogue, T* y, Moments<T>* moments) const {
    const int64_t first = begin(block), rows = end(block) - first;
    const bool flat = w_.kind == Window<O>::gathered && c.dense();
    const int64_t segments = flat ? 1 : rows, pixels = flat ? rows * c.columns : c.columns;
    const int64_t tiles = (pixels + kConvRows<O> - 1) / kConvRows<O>;
    alignas(64) float tile[kConvRows<O> * kPanel];
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t row = first + s;
      const int64_t out = c.out_offset + row / c.rows * c.out_image + row % c.rows * c.out_row + filter;
      for (int64_t t = 0; t < tiles; ++t) {  // of pixels that differ by one at most
        const int64_t from = pixels * t / tiles, count = pixels * (t + 1) / tiles - from;
        epilogue.prefetch(count, filters, y, out + from * c.out_pixel, c.out_pixel);
        multiply_runs<false>(operands + s * row_ + from * pixel_, pixel_, w_.runs, w_.depth, right, tile,
                             count, filters, false);
        epilogue.write(tile, count, filters, filter, y, out + from * c.out_pixel, c.out_pixel);
        if (moments) moments->add(tile, count, filters);
      }
    }
    return true;
  }

  const Correlation& c;

 private:
  int64_t begin(int64_t block) const { return block / in_span_ * span_ + block % in_span_ * rows_; }
  int64_t end(int64_t block) const { return std::min(begin(block) + rows_, (block / in_span_ + 1) * span_); }

  Window<O> w_;
  int64_t rows_, in_span_, span_;  // rows in a block; blocks in `span` rows
  bool direct_;
  int64_t pixel_, row_;  // elements of the operands from pixel to pixel and from row to row
};

template <class Way, class T, class O>
void pack_weight(const Way& way, const T* weight, O* packed, int threads) {
  const Correlation& c = way.c;
  const int64_t panels = c.groups * way.panels();
  parallel_for(panels, panels * way.panel(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % way.panels() * kPanel;
      way.pack(weight + i / way.panels() * c.group_stride + first * c.filter_stride,
               std::min(kPanel, c.filters - first), packed + i * way.panel());
    }
  });
}

// As correlate(); whether all sums that the way forms are finite.
template <class Way, class T, class O = OperandOf<T>>
bool correlate_by(const Way& way, const T* x, const T* weight, const O* packed, const Epilogue<T>& epilogue,
                  T* y, float* statistics, int threads) {
  const Correlation& c = way.c;
  const Room<O> packed_here(packed ? 0 : c.groups * way.panels() * way.panel());
  if (!packed) pack_weight(way, weight, packed_here.get(), threads);
  const O* right = packed ? packed : packed_here.get();
  const int64_t blocks = way.blocks();
  const int64_t chunks = std::clamp<int64_t>(kItems / (blocks * c.groups), 1, way.panels());
  const int64_t items = blocks * c.groups * chunks, all = c.groups * c.filters;
  const Room<O> rooms(threads * way.room());
  const Room<float> runs(statistics ? blocks * 3 * all : 0);
  const int64_t work = c.grid() * all * std::max<int64_t>(1, c.taps.size() * c.depth);
  std::atomic<bool> finite{true};
  parallel_claim(items, work, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    Moments<T> moments;
    O* room = rooms.get() + thread * way.room();
    for (int64_t item; (item = next()) < items;) {
      const int64_t chunk = item % chunks, group = item / chunks % c.groups, block = item / chunks / c.groups;
      const O* operands = way.operands(x, group, block, room);
      for (int64_t p = way.panels() * chunk / chunks; p < way.panels() * (chunk + 1) / chunks; ++p) {
        const int64_t filters = std::min(kPanel, c.filters - p * kPanel);
        const int64_t filter = group * c.filters + p * kPanel;
        if (!way.panel_of_block(operands, room, right + (group * way.panels() + p) * way.panel(), block,
                                filter, filters, epilogue, y, statistics ? &moments : nullptr))
          finite.store(false, std::memory_order_relaxed);
        if (statistics) moments.write(filters, runs.get() + block * 3 * all + filter, all);
      }
    }
  });
  if (statistics)
    batch_norm_act_statistics(nullptr, runs.get(), statistics, statistics + all,
                              {c.grid(), all, blocks, DType::f32, Activation::none, 0.0f}, threads);
  return finite;
}

// packed: the weights as the way that is taken packs them, or null. statistics: (2, filters), the mean and
// variance of each filter over all pixels, or null.
template <class T>
void correlate(const Correlation& c, const T* x, const T* weight, const void* packed,
               const Epilogue<T>& epilogue, T* y, float* statistics, int threads) {
  const auto* panels = static_cast<const OperandOf<T>*>(packed);
  if constexpr (std::is_same_v<OperandOf<T>, float>) {
    if (Winograd<T>::admits(c)) {
      if (correlate_by(Winograd<T>(c), x, weight, panels, epilogue, y, statistics, threads)) return;
      panels = nullptr;
    }
  }
  correlate_by(ImplicitGemm<T>(c), x, weight, panels, epilogue, y, statistics, threads);
}

// Calls f(way) with the way that correlate() tries first.
template <class T, class Call>
auto with_way(const Correlation& c, Call f) {
  if constexpr (std::is_same_v<OperandOf<T>, float>)
    if (Winograd<T>::admits(c)) return f(Winograd<T>(c));
  return f(ImplicitGemm<T>(c));
}

// The mean and variance of y's channels, for kernels that do not take them as they go.
void statistics_of(const void* y, float* statistics, const Conv2dShape& s, int threads) {
  const int64_t rows = s.batch * s.out_height * s.out_width;
  const int64_t runs = std::clamp<int64_t>(rows / 256, 1, 32);
  const Room<float> partial(runs * 3 * s.filters);
  batch_norm_act_statistics(y, partial.get(), statistics, statistics + s.filters,
                            {rows, s.filters, runs, s.dtype, Activation::none, 0.0f}, threads);
}

template <class T>
void forward(const T* x, const T* weight, const void* packed, const Conv2dEpilogue& e, T* y,
             float* statistics, const Conv2dShape& s, int threads) {
  const Correlation c = sums_over_x(s);
  if (Depthwise::admits(c)) {
    depthwise_forward(x, weight, packed, e, y, s, threads);
    if (statistics) statistics_of(y, statistics, s, threads);
    return;
  }
  correlate(c, x, weight, packed,
            Epilogue<T>{e.scale, e.shift, static_cast<const T*>(e.residual), e.activation}, y, statistics,
            threads);
}

template <class T>
void backward_data(const T* dz, const T* weight, T* dx, const Conv2dShape& s, int threads) {
  if (Depthwise::admits(sums_over_dz(s, 0, 0))) return depthwise_backward_data(dz, weight, dx, s, threads);
  for (int64_t i = 0; i < std::min(s.stride_h, s.height); ++i)
    for (int64_t j = 0; j < std::min(s.stride_w, s.width); ++j)
      if (const Correlation c = sums_over_dz(s, i, j); c.grid())
        correlate(c, dz, weight, nullptr, Epilogue<T>{nullptr, nullptr, nullptr, Activation::none}, dx,
                  nullptr, threads);
}

// Calls f(T{}) with the type of the tensors.
template <class Call>
void with_type(const Conv2dShape& s, Call f) {
  if (s.dtype == DType::f32) return f(float{});
  return s.dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

}  // namespace

int64_t conv2d_packed_bytes(const Conv2dShape& s) {
  int64_t bytes = 0;
  with_type(s, [&](auto type) {
    using T = decltype(type);
    const Correlation c = sums_over_x(s);
    if (Depthwise::admits(c)) return void(bytes = depthwise_packed_bytes<T>(s));
    with_way<T>(c, [&](const auto& way) {
      bytes = s.groups * way.panels() * way.panel() * int64_t(sizeof(OperandOf<T>));
    });
  });
  return bytes;
}

void conv2d_pack(const void* weight, void* packed, const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    const Correlation c = sums_over_x(s);
    if (Depthwise::admits(c)) return depthwise_pack(static_cast<const T*>(weight), packed, s, threads);
    with_way<T>(c, [&](const auto& way) {
      pack_weight(way, static_cast<const T*>(weight), static_cast<OperandOf<T>*>(packed), threads);
    });
  });
}

void conv2d_forward(const void* x, const void* weight, const void* packed, const Conv2dEpilogue& epilogue,
                    void* y, float* statistics, const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    prepare_output(static_cast<T*>(y), s.batch * s.out_height * s.out_width * s.filters);
    forward(static_cast<const T*>(x), static_cast<const T*>(weight), packed, epilogue, static_cast<T*>(y),
            statistics, s, threads);
  });
}

void conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight,
                     const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(dz);
    prepare_output(static_cast<T*>(dx), s.batch * s.height * s.width * s.channels);
    if (dx) backward_data(from, static_cast<const T*>(weight), static_cast<T*>(dx), s, threads);
    const bool depthwise = dweight && Depthwise::admits(sums_over_x(s));
    const auto backward_weight = depthwise ? &depthwise_backward_weight<T> : &conv2d_backward_weight<T>;
    if (dweight) backward_weight(from, static_cast<const T*>(x), static_cast<T*>(dweight), s, threads);
  });
}

}  // namespace lspm::cpu
