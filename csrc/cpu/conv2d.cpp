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

#include "cpu/activation.h"
#include "cpu/conv2d_tiles.h"
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
  const int64_t rows = w.gathered ? c.depth : w.depth;  // from tap to tap
  for (const Tap& tap : c.taps) {
    const T* from = weight + tap.filter;
    const int64_t at = (&tap - c.taps.data()) * rows;
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

template <class T>
struct Epilogue {
  const float *scale, *shift;
  const T* residual;
  Activation activation;

  // Rows of a tile, which begin with filter `filter`, into pixels from `out` on of y.
  void write(const float* tile, int64_t rows, int64_t filters, int64_t filter, T* y, int64_t out,
             int64_t pixel) const {
    with_activation(activation, [&](auto kind) {
      for (int64_t r = 0; r < rows; ++r, tile += kPanel, out += pixel)
        for_each_vector(filters, [&](int64_t i, auto lanes) {
          F v = load(tile + i);
          if (scale) v *= lanes.load(scale + filter + i);
          if (shift) v += lanes.load(shift + filter + i);
          if (residual) v += lanes.load(residual + out + i);
          lanes.store(y + out + i, activated<kind.value>(v));
        });
    });
  }
};

constexpr int64_t kWindowBytes =
    384 * 1024;                // of the input's copy: beside a panel it fits a second-level cache
constexpr int64_t kItems = 8;  // at least, where there are so many, for threads to share

template <class T>
void correlate(const Correlation& c, const T* x, const T* weight, const Epilogue<T>& epilogue, T* y,
               int threads) {
  using O = OperandOf<T>;
  const Window<O> w(c);
  const Room<O> packed(c.groups * w.panels() * w.panel());
  pack_weight(w, weight, packed.get(), threads);
  // Rows are counted through all images; only where pixels lie side by side may a block hold several images'.
  const int64_t all = c.batch * c.rows, together = w.gathered ? all : c.rows;
  const int64_t fits =
      std::max<int64_t>(1, kWindowBytes / int64_t(sizeof(O)) / std::max<int64_t>(1, w.size(1)));
  const int64_t block = std::min(together, fits), blocks = (together + block - 1) / block * (all / together);
  const int64_t chunks = std::clamp<int64_t>(kItems / (blocks * c.groups), 1, w.panels());
  const int64_t items = blocks * c.groups * chunks, room = w.size(block);
  const Room<O> windows(threads * room);
  const int64_t work = c.grid() * c.groups * c.filters * std::max<int64_t>(1, c.taps.size() * c.depth);
  parallel_claim(items, work, threads, [&](auto next, int thread) {
    const TileRegisters tiles;
    alignas(64) float tile[kConvRows<O> * kPanel];
    O* window = windows.get() + thread * room;
    for (int64_t item; (item = next()) < items;) {
      const int64_t chunk = item % chunks, group = item / chunks % c.groups, at = item / chunks / c.groups;
      const int64_t per_image = (together + block - 1) / block;
      const int64_t first = at / per_image * together + at % per_image * block;
      const int64_t rows = std::min(block, (at / per_image + 1) * together - first);
      w.fill(x, group, first, rows, window);
      const bool flat = w.gathered && c.dense();
      const int64_t segments = flat ? 1 : rows, pixels = flat ? rows * c.columns : c.columns;
      const int64_t tiles_of = (pixels + kConvRows<O> - 1) / kConvRows<O>;
      for (int64_t p = w.panels() * chunk / chunks; p < w.panels() * (chunk + 1) / chunks; ++p) {
        const int64_t filters = std::min(kPanel, c.filters - p * kPanel),
                      filter = group * c.filters + p * kPanel;
        const O* right = packed.get() + (group * w.panels() + p) * w.panel();
        for (int64_t s = 0; s < segments; ++s) {
          const int64_t row = first + s;
          const O* left = window + s * w.row_stride();
          const int64_t out = c.out_offset + row / c.rows * c.out_image + row % c.rows * c.out_row + filter;
          for (int64_t t = 0; t < tiles_of; ++t) {  // of pixels that differ by one at most
            const int64_t from = pixels * t / tiles_of, count = pixels * (t + 1) / tiles_of - from;
            multiply_runs<false>(left + from * w.pixel_stride(), w.pixel_stride(), w.runs, w.depth, right,
                                 tile, count, filters, false);
            epilogue.write(tile, count, filters, filter, y, out + from * c.out_pixel, c.out_pixel);
          }
        }
      }
    }
  });
}

template <class T>
void forward(const T* x, const T* weight, const Conv2dEpilogue& e, T* y, const Conv2dShape& s, int threads) {
  correlate(sums_over_x(s), x, weight,
            Epilogue<T>{e.scale, e.shift, static_cast<const T*>(e.residual), e.activation}, y, threads);
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
    correlate(c, dz, weight, Epilogue<T>{nullptr, nullptr, nullptr, Activation::none}, dx, threads);
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
                    const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    forward(static_cast<const T*>(x), static_cast<const T*>(weight), epilogue, static_cast<T*>(y), s,
            threads);
  });
}

void conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight,
                     const Conv2dShape& s, int threads) {
  with_type(s, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(dz);
    if (dx) backward_data(from, static_cast<const T*>(weight), static_cast<T*>(dx), s, threads);
    if (dweight) conv2d_backward_weight(from, static_cast<const T*>(x), static_cast<T*>(dweight), s, threads);
  });
}

}  // namespace lspm::cpu
