// Where the windows of a pooling lie along one dimension.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

// One of the two dimensions that windows move along.
struct PoolAxis {
  int64_t in, out, kernel, stride, padding, dilation;

  LSPM_HOST_DEVICE int64_t start(int64_t window) const { return window * stride - padding; }
  // The taps of a window that lie inside: [first, end), which may be empty.
  LSPM_HOST_DEVICE int64_t first(int64_t window) const {
    const int64_t at = start(window);
    return at < 0 ? (dilation - 1 - at) / dilation : 0;
  }
  LSPM_HOST_DEVICE int64_t end(int64_t window) const {
    const int64_t at = start(window);
    const int64_t inside = at < in ? (in - at + dilation - 1) / dilation : 0;
    return inside < kernel ? inside : kernel;
  }
  // The windows that may reach an element: [first, end).
  LSPM_HOST_DEVICE int64_t first_window(int64_t element) const {
    const int64_t before = element + padding - (kernel - 1) * dilation;
    return before > 0 ? (before + stride - 1) / stride : 0;
  }
  LSPM_HOST_DEVICE int64_t end_window(int64_t element) const {
    const int64_t last = (element + padding) / stride;
    return last < out ? last + 1 : out;
  }
  // Where the element is the tap of a window, that tap; else -1.
  LSPM_HOST_DEVICE int64_t tap(int64_t element, int64_t window) const {
    const int64_t distance = element - start(window);
    return distance % dilation ? -1 : distance / dilation;
  }
};

}  // namespace lspm
