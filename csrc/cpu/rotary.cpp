// Rotary position embedding (Su et al. 2021). A thread owns whole positions of a sequence. The position's row
// of cos and sin becomes floats once, in the order in which pairs of vectors of T come apart, and then meets
// every head from the first-level cache; each head is read once and written once. Bytes per element, in sizes
// of T: 2.
#include "rotary.h"

#include <cstring>
#include <memory>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

// The even and the odd elements of 2 * kLanes, rotated by kLanes angles.
template <bool kStream, class T>
void rotate_interleaved(const T* x, T* out, F cos, F sin) {
  const PairLanes<T> lanes;
  Pair v = lanes.load(x);
  if constexpr (!lanes.kApart) unzip(v.first, v.second);
  Pair turned{v.first * cos - v.second * sin, v.second * cos + v.first * sin};
  if constexpr (!lanes.kApart) zip(turned.first, turned.second);
  write<kStream>(out, turned, lanes);
}

template <class T, class W>
struct Rotation {
  const T* x;
  const W *cos, *sin;
  const int64_t* offsets;
  T* out;
  const RotaryShape& shape;

  // Sequences and positions in them, [begin, end) of batch * rows.
  template <bool kStream, bool kInterleaved>
  void rows(int64_t begin, int64_t end) const {
    const RotaryShape& s = shape;
    const std::unique_ptr<float[]> room(new float[2 * s.half]);
    float *const c = room.get(), *const d = c + s.half;
    for (; begin < end; ++begin) {
      const int64_t sequence = begin / s.rows, row = begin % s.rows;
      const int64_t position = (offsets ? offsets[sequence] : s.offset) + row;
      take<kInterleaved>(cos + position * s.half, 1.0f, c);
      take<kInterleaved>(sin + position * s.half, s.inverse ? -1.0f : 1.0f, d);
      const T* from = x + sequence * s.batch_stride + row * s.row_stride;
      T* to = out + begin * s.heads * s.dim;
      for (int64_t head = 0; head < s.heads; ++head, from += s.head_stride, to += s.dim) {
        if constexpr (kInterleaved)
          interleaved_row<kStream>(from, to, c, d);
        else
          half_row<kStream>(from, to, c, d);
        std::memcpy(to + 2 * s.half, from + 2 * s.half, (s.dim - 2 * s.half) * sizeof(T));
      }
    }
    if (kStream) stream_fence();
  }

  template <bool kInterleaved>
  void take(const W* table, float sign, float* room) const {
    if constexpr (kInterleaved)  // pairs come apart by themselves: no other order than the table's
      for_each_vector(shape.half,
                      [&](int64_t i, auto lanes) { lanes.store(room + i, lanes.load(table + i) * sign); });
    else
      for_each_pair<T>(0, shape.half, [&](int64_t i, auto lanes) {
        lanes.store(room + i, lanes.load_ordered(table + i) * sign);
      });
  }

  template <bool kStream>
  void half_row(const T* from, T* to, const float* cos, const float* sin) const {
    const int64_t half = shape.half;
    for_each_pair<T>(0, half, [&](int64_t i, auto lanes) {
      const auto a = lanes.load(from + i), b = lanes.load(from + half + i);
      const auto c = lanes.load(cos + i), d = lanes.load(sin + i);
      write<kStream>(to + i, a * c - b * d, lanes);
      write<kStream>(to + half + i, b * c + a * d, lanes);
    });
  }

  template <bool kStream>
  void interleaved_row(const T* from, T* to, const float* cos, const float* sin) const {
    const int64_t half = shape.half;
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
};

template <class T, class W>
void rotate(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& s, int threads) {
  using Job = Rotation<T, W>;
  const Job job{static_cast<const T*>(x),   static_cast<const W*>(cos),
                static_cast<const W*>(sin), offsets,
                static_cast<T*>(out),       s};
  const int64_t run = s.interleaved ? 2 * s.half : s.half;  // of elements that lie one after the other
  const bool stream = streams(job.out, s.elements(), s.dim | run);
  const auto rows = stream
                        ? s.interleaved ? &Job::template rows<true, true> : &Job::template rows<true, false>
                    : s.interleaved ? &Job::template rows<false, true>
                                    : &Job::template rows<false, false>;
  parallel_for(s.batch * s.rows, s.elements(), threads,
               [&](int64_t begin, int64_t end) { (job.*rows)(begin, end); });
}

}  // namespace

void rotary(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& shape, int threads) {
  const bool wide = shape.table_dtype == DType::f32;
  const auto run = shape.dtype == DType::f32    ? &rotate<float, float>
                   : shape.dtype == DType::bf16 ? wide ? &rotate<bf16, float> : &rotate<bf16, bf16>
                   : wide                       ? &rotate<f16, float>
                                                : &rotate<f16, f16>;
  run(x, cos, sin, offsets, out, shape, threads);
}

}  // namespace lspm::cpu
