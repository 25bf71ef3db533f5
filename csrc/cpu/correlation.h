// Forward and gradient of x of a convolution are correlations: for each pixel of a grid a sum over taps,
// which are pixels of the input in a fixed place from it, and over the channels of each.
#pragma once
#include <memory>
#include <new>
#include <vector>

#include "conv2d.h"

namespace lspm::cpu {

// Scratch memory that begins on a cache line, not initialised.
template <class T>
class Room {
 public:
  explicit Room(int64_t n = 0) : data_(n ? new (kLine) T[n] : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* p) const { operator delete[](p, kLine); }
  };
  std::unique_ptr<T[], Delete> data_;
};

struct Tap {
  int64_t row, column;  // of the input, from where the stride takes the grid's point
  int64_t filter;       // where its weights begin, in elements
};

struct Correlation {
  int64_t batch, height, width, channels;             // of the input
  int64_t rows, columns;                              // of the grid
  int64_t stride_h, stride_w;                         // pixels of the input from point to point
  int64_t groups, depth, filters;                     // a group's channels in and out
  int64_t group_stride, depth_stride, filter_stride;  // of the weight, in elements
  int64_t out_offset, out_image, out_row, out_pixel;  // of the output
  std::vector<Tap> taps;

  int64_t grid() const { return batch * rows * columns; }
  bool dense() const { return out_row == columns * out_pixel && out_image == rows * out_row; }
};

// The forward's sums.
inline Correlation sums_over_x(const Conv2dShape& s) {
  Correlation c{s.batch,
                s.height,
                s.width,
                s.channels,
                s.out_height,
                s.out_width,
                s.stride_h,
                s.stride_w,
                s.groups,
                s.group_channels(),
                s.group_filters(),
                s.group_filters() * s.weight_strides[0],
                s.weight_strides[1],
                s.weight_strides[0],
                0,
                s.out_height * s.out_width * s.filters,
                s.out_width * s.filters,
                s.filters,
                {}};
  for (int64_t r = 0; r < s.kernel_h; ++r)
    for (int64_t q = 0; q < s.kernel_w; ++q)
      c.taps.push_back({r * s.dilation_h - s.padding_h, q * s.dilation_w - s.padding_w,
                        r * s.weight_strides[2] + q * s.weight_strides[3]});
  return c;
}

// Those of the gradient of x, for its pixels in rows i, i + stride_h, ... and columns j, j + stride_w, ...
inline Correlation sums_over_dz(const Conv2dShape& s, int64_t i, int64_t j) {
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
  return c;
}

}  // namespace lspm::cpu
