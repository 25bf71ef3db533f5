// What the passes of conv2d have in common: how input and weight lie in scratch, and the tiles multiplied.
//
// The input's pixels are copied once, with zeros around the image, so that each tap is one offset for all
// pixels of a row, and rows of a tile lie a stride apart: an implicit GEMM, whose left side is read where the
// copy lies. Pixels lie an odd number of cache lines apart, for else rows of a tile would share few sets of
// the cache.
#pragma once
#include "cpu/correlation.h"
#include "cpu/gemm_bf16.h"

namespace lspm::cpu {

// What runs are filled up to, and rows in a tile: tile registers take 32 bfloat16 at a time, dot products
// two.
#if defined(__AMX_BF16__)
template <class O>
constexpr int64_t kRunDepth = kTileDepth<O>;
template <class O>
constexpr int64_t kConvRows = std::is_same_v<O, bf16> ? 32 : kTileRows;
#else
template <class O>
constexpr int64_t kRunDepth = Step<O>::kDepth;
template <class O>
constexpr int64_t kConvRows = kTileRows;
#endif

// Products in one sum: rounding errors grow with a sum's length, and bfloat16's own are larger than any.
template <class O>
constexpr int64_t kSumRun = std::is_same_v<O, float> ? 64 : 1024;

// How a block of the input lies in scratch, and what of it a point of the grid reads: `runs`, which begin at
// these offsets and are `depth` long.
template <class O>
struct Window {
  enum Kind {
    pixels,   // as the image has them: a run is a tap
    strips,   // of few channels, without gaps: a run is a row of taps
    gathered  // all that a point reads side by side, point for point of the grid: one run
  };

  const Correlation& c;
  Kind kind;
  int64_t top = 0, left = 0;  // the first row and column that a tap of point (0, 0) reads
  int64_t span = 0;           // rows that the taps of a point lie in
  int64_t width;              // pixels in a row
  int64_t tap_depth;          // elements from tap to tap of a point, in the order of the weight
  int64_t depth, pitch;       // elements in a run, and from pixel to pixel
  std::vector<int64_t> runs;

  static constexpr int64_t kFewChannels = 16, kLine = 64 / sizeof(O);

  explicit Window(const Correlation& correlation, bool gathers = false) : c(correlation) {
    const int64_t taps = c.taps.size(), in_row = taps_in_row();
    const bool few = c.depth < kFewChannels && in_row * c.depth > 1;
    const bool filled_up = kRunDepth<O> > 2 && (c.depth % kRunDepth<O> || few);
    kind = gathers || taps <= 1 || filled_up || (few && !in_row) ? gathered : few ? strips : pixels;
    tap_depth = kind == gathered ? c.depth : round_up(c.depth, kRunDepth<O>);
    depth = round_up(tap_depth * (kind == gathered ? taps : kind == strips ? in_row : 1), kRunDepth<O>);
    pitch = kind == strips ? tap_depth : (round_up(depth, kLine) / kLine | 1) * kLine;
    width = c.columns;
    if (kind == gathered) {
      if (taps) runs.push_back(0);
      return;
    }
    int64_t bottom = top = c.taps[0].row, right = left = c.taps[0].column;
    for (const Tap& tap : c.taps) {
      top = std::min(top, tap.row), bottom = std::max(bottom, tap.row);
      left = std::min(left, tap.column), right = std::max(right, tap.column);
    }
    span = bottom - top + 1;
    width = (c.columns - 1) * c.stride_w + right - left + 1;
    for (int64_t t = 0; t < taps; t += kind == strips ? in_row : 1)
      runs.push_back(((c.taps[t].row - top) * width + c.taps[t].column - left) * pitch);
  }

  int64_t rows_of(int64_t rows) const { return kind == gathered ? rows : (rows - 1) * c.stride_h + span; }
  int64_t pixel_stride() const { return kind == gathered ? pitch : c.stride_w * pitch; }
  int64_t row_stride() const { return (kind == gathered ? 1 : c.stride_h) * width * pitch; }
  int64_t panel() const { return (runs.size() * depth + 32) * kPanel; }  // packing fills 32 up with zeros
  int64_t panels() const { return (c.filters + kPanel - 1) / kPanel; }
  // Elements of `rows` rows of the grid, and what a tile of more rows than there are reads beyond.
  int64_t size(int64_t rows) const { return rows_of(rows) * width * pitch + kConvRows<O> * pixel_stride(); }

  // Copies what rows [first, first + rows) of the grid read, counted through all images; where it is not
  // gathered, all of one image.
  template <class T>
  void fill(const T* x, int64_t group, int64_t first, int64_t rows, O* to) const {
    x += group * c.depth;
    if (kind == gathered) return gather(x, first, rows, to);
    x += first / c.rows * c.height * c.width * c.channels;
    const int64_t begin = std::clamp<int64_t>(-left, 0, width);
    const int64_t end = std::clamp<int64_t>(c.width - left, begin, width);
    const bool whole = kind == strips && pitch == c.channels;  // a row of pixels is one copy
    for (int64_t i = 0; i < rows_of(rows); ++i, to += width * pitch) {
      const int64_t row = first % c.rows * c.stride_h + top + i;
      if (row < 0 || row >= c.height) {
        std::fill_n(to, width * pitch, O{});
        continue;
      }
      std::fill_n(to, begin * pitch, O{});
      std::fill_n(to + end * pitch, (width - end) * pitch, O{});
      const T* from = x + (row * c.width + left) * c.channels;
      if (whole)
        copy(from + begin * pitch, (end - begin) * pitch, to + begin * pitch);
      else
        for (int64_t j = begin; j < end; ++j) {
          copy(from + j * c.channels, c.depth, to + j * pitch);
          std::fill_n(to + j * pitch + c.depth, tap_depth - c.depth, O{});
        }
    }
  }

 private:
  // Taps that follow each other in each row of them, side by side; 0 where rows are not like that.
  int64_t taps_in_row() const {
    const int64_t taps = c.taps.size();
    int64_t n = 1;
    while (n < taps && c.taps[n].row == c.taps[0].row) ++n;
    for (int64_t t = 0; t < taps; ++t)
      if (taps % n || c.taps[t].row != c.taps[t / n * n].row ||
          c.taps[t].column != c.taps[t / n * n].column + t % n)
        return 0;
    return n;
  }

  template <class T>
  static void copy(const T* from, int64_t n, O* to) {
    if constexpr (std::is_same_v<T, O>)
      std::memcpy(to, from, n * sizeof(O));
    else
      for_each_vector(n, [&](int64_t i, auto lanes) { lanes.store(to + i, lanes.load(from + i)); });
  }

  template <class T>
  void gather(const T* x, int64_t first, int64_t rows, O* to) const {
    const int64_t in_row = c.channels == c.depth ? std::max<int64_t>(1, taps_in_row()) : 1;
    for (int64_t i = first; i < first + rows; ++i)
      for (int64_t j = 0; j < c.columns; ++j, to += pitch) {
        O* at = to;
        for (size_t t = 0; t < c.taps.size(); t += in_row, at += in_row * c.depth) {
          const int64_t row = i % c.rows * c.stride_h + c.taps[t].row,
                        column = j * c.stride_w + c.taps[t].column;
          const bool inside = row >= 0 && row < c.height;
          const int64_t begin = std::clamp<int64_t>(-column, 0, inside ? in_row : 0);
          const int64_t end = std::clamp<int64_t>(c.width - column, begin, inside ? in_row : 0);
          std::fill_n(at, begin * c.depth, O{});
          copy(x + ((i / c.rows * c.height + row) * c.width + column + begin) * c.channels,
               (end - begin) * c.depth, at + begin * c.depth);
          std::fill_n(at + end * c.depth, (in_row - end) * c.depth, O{});
        }
        std::fill(at, to + depth, O{});
      }
  }
};

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

// Rows of the left side times a panel of the right one, along all runs.
template <bool kTransposed, int kRows, int kVectors, class O>
void runs_tile(const O* left, int64_t stride, const int64_t* runs, int64_t count, int64_t depth,
               const O* right, float* c, bool accumulate) {
  using One = Step<O>;
  F sums[kRows][kVectors] = {};
  int64_t summed = 0;
  const auto put_down = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * kPanel + v * kLanes;
        store(to, accumulate ? load(to) + sums[r][v] : sums[r][v]);
        sums[r][v] = F{};
      }
    accumulate = true;
    summed = 0;
  };
  for (int64_t run = 0; run < count; ++run) {
    // A pointer for every third row reaches two more by the stride: there are too few registers for all.
    const O* at[(kRows + 2) / 3];
    for (int i = 0; i < (kRows + 2) / 3; ++i) at[i] = left + runs[run] + (kTransposed ? 0 : 3 * i * stride);
    const auto step = [&](int64_t d, auto load_left) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const F a = load_left(kTransposed ? at[0] + r : at[r / 3] + r % 3 * stride + d);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          sums[r][v] = One::add_product(sums[r][v], a, right + v * kLanes * One::kDepth);
      }
      right += kPanel * One::kDepth;
      if (kTransposed) at[0] += stride;
    };
    const auto go_on = [&](int64_t d) {
      if (!kTransposed)
        for (auto& p : at) p += d;
    };
    for (int64_t begin = 0; begin < depth; begin += kSumRun<O>) {
      const int64_t end = std::min(depth, begin + kSumRun<O>);
      int64_t d = begin;
      for (; d + 4 * One::kDepth <= end; d += 4 * One::kDepth, go_on(4 * One::kDepth))
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) step(i * One::kDepth, One::load_left);
      for (; d + One::kDepth <= end; d += One::kDepth, go_on(One::kDepth)) step(0, One::load_left);
      if (d < end) step(0, One::load_last);
      summed += end - begin;
      if (summed >= kSumRun<O>) put_down();
    }
  }
  if (summed || !accumulate) put_down();
}

template <class O>
using RunsTile = void (*)(const O*, int64_t, const int64_t*, int64_t, int64_t, const O*, float*, bool);

template <bool kTransposed, int kVectors, class O, int... kRows>
constexpr std::array<RunsTile<O>, sizeof...(kRows)> runs_tiles(std::integer_sequence<int, kRows...>) {
  return {runs_tile<kTransposed, kRows + 1, kVectors, O>...};
}

// c (rows x kPanel) = or += the product of at most kConvRows<O> rows, which go on at each of `runs`, with one
// panel; columns beyond those asked for may hold anything.
template <bool kTransposed, class O>
void multiply_runs(const O* left, int64_t stride, const std::vector<int64_t>& runs, int64_t depth,
                   const O* right, float* c, int64_t rows, int64_t columns, bool accumulate) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<O, bf16> && !kTransposed)
    return tile_block(left, stride, runs.data(), runs.size(), depth, right, c, kPanel, rows, accumulate);
#endif
  constexpr auto kRows = std::make_integer_sequence<int, kTileRows>();
  constexpr auto kHalf = runs_tiles<kTransposed, 1, O>(kRows), kWhole = runs_tiles<kTransposed, 2, O>(kRows);
  (columns > kLanes ? kWhole : kHalf)[rows - 1](left, stride, runs.data(), runs.size(), depth, right, c,
                                                accumulate);
}

// The gradient of weight; a file of its own.
template <class T>
void conv2d_backward_weight(const T* dz, const T* x, T* dweight, const Conv2dShape& shape, int threads);

}  // namespace lspm::cpu
