// Rows rotated by the angles of a position, as rotary and the caches of attention do it.
#pragma once
#include <cstring>
#include <memory>

#include "cpu/memory.h"

namespace lspm::cpu {

// Rows of `dim` elements, of whose first 2 * half pairs are rotated. The cos and sin of a position become
// floats once, in the order in which pairs of vectors of T come apart, and then meet every head from the
// first-level cache.
template <class T, bool kInterleaved>
class Rotation {
 public:
  Rotation(int64_t half, int64_t dim) : half_(half), dim_(dim), room_(new float[2 * half]) {}

  // The rows of a position in the tables; sin times `sign`.
  template <class W>
  void take(const W* cos, const W* sin, float sign) {
    take(cos, 1.0f, room_.get());
    take(sin, sign, room_.get() + half_);
  }

  // The rows of `count` heads, which lie a stride apart.
  template <bool kStream>
  void rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count) const {
    const int64_t half = half_, rest = dim_ - 2 * half;
    const float *const cos = room_.get(), *const sin = cos + half;
    for (; count > 0; --count, from += from_stride, to += to_stride) {
      if constexpr (kInterleaved)
        interleaved_row<kStream>(from, to, cos, sin, half);
      else
        half_row<kStream>(from, to, cos, sin, half);
      std::memcpy(to + 2 * half, from + 2 * half, rest * sizeof(T));
    }
  }

 private:
  template <class W>
  void take(const W* table, float sign, float* room) const {
    if constexpr (kInterleaved)  // pairs come apart by themselves: no other order than the table's
      for_each_vector(half_,
                      [&](int64_t i, auto lanes) { lanes.store(room + i, lanes.load(table + i) * sign); });
    else
      for_each_pair<T>(0, half_, [&](int64_t i, auto lanes) {
        lanes.store(room + i, lanes.load_ordered(table + i) * sign);
      });
  }

  template <bool kStream>
  static void half_row(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
    for_each_pair<T>(0, half, [&](int64_t i, auto lanes) {
      const auto a = lanes.load(from + i), b = lanes.load(from + half + i);
      const auto c = lanes.load(cos + i), d = lanes.load(sin + i);
      write<kStream>(to + i, a * c - b * d, lanes);
      write<kStream>(to + half + i, b * c + a * d, lanes);
    });
  }

  // The even and the odd elements of 2 * kLanes, rotated by kLanes angles.
  template <bool kStream>
  static void rotate_interleaved(const T* x, T* out, F cos, F sin) {
    const PairLanes<T> lanes;
    Pair v = lanes.load(x);
    if constexpr (!lanes.kApart) unzip(v.first, v.second);
    Pair turned{v.first * cos - v.second * sin, v.second * cos + v.first * sin};
    if constexpr (!lanes.kApart) zip(turned.first, turned.second);
    write<kStream>(out, turned, lanes);
  }

  template <bool kStream>
  static void interleaved_row(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes)
      rotate_interleaved<kStream>(from + 2 * i, to + 2 * i, load(cos + i), load(sin + i));
    if (i == half) return;
    const FirstLanes lanes{int(half - i)};
    const size_t bytes = 2 * lanes.n * sizeof(T);
    T room[2 * kLanes] = {};
    std::memcpy(room, from + 2 * i, bytes);
    rotate_interleaved<false>(room, room, lanes.load(cos + i), lanes.load(sin + i));
    std::memcpy(to + 2 * i, room, bytes);
  }

  int64_t half_, dim_;
  std::unique_ptr<float[]> room_;
};

// Calls call(T, W), one of each: the types of a row and of the tables of angles, which are T or float.
template <class Call>
void with_types(DType dtype, DType table_dtype, Call call) {
  const bool wide = table_dtype == DType::f32;
  if (dtype == DType::f32) return call(float{}, float{});
  if (dtype == DType::bf16) return wide ? call(bf16{}, float{}) : call(bf16{}, bf16{});
  return wide ? call(f16{}, float{}) : call(f16{}, f16{});
}

}  // namespace lspm::cpu
