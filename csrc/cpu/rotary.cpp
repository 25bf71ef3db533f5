// Rotary position embedding (Su et al. 2021). A thread owns whole positions of a sequence, whose angles it
// prepares once for all heads; each head is read once and written once. Bytes per element, in sizes of T: 2.
#include "rotary.h"

#include "cpu/parallel.h"
#include "cpu/rotation.h"

namespace lspm::cpu {
namespace {

template <class T, class W>
struct Rows {
  const T* x;
  const W *cos, *sin;
  const int64_t* offsets;
  T* out;
  const RotaryShape& shape;

  // Sequences and positions in them, [begin, end) of batch * rows.
  template <bool kStream, bool kInterleaved>
  void rotate(int64_t begin, int64_t end) const {
    const RotaryShape& s = shape;
    Rotation<T, kInterleaved> rotation(s.half, s.dim);
    for (; begin < end; ++begin) {
      const int64_t sequence = begin / s.rows, row = begin % s.rows;
      const int64_t position = (offsets ? offsets[sequence] : s.offset) + row;
      rotation.take(cos + position * s.half, sin + position * s.half, s.inverse ? -1.0f : 1.0f);
      const T* from = x + sequence * s.batch_stride + row * s.row_stride;
      T* to = out + begin * s.heads * s.dim;
      rotation.template rows<kStream>(from, s.head_stride, to, s.dim, s.heads);
    }
    if (kStream) stream_fence();
  }
};

template <class T, class W>
void rotate(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& s, int threads) {
  using Job = Rows<T, W>;
  const Job job{static_cast<const T*>(x),   static_cast<const W*>(cos),
                static_cast<const W*>(sin), offsets,
                static_cast<T*>(out),       s};
  const int64_t run = s.interleaved ? 2 * s.half : s.half;  // of elements that lie one after the other
  const bool stream = streams(job.out, s.elements(), s.dim | run);
  const auto rows =
      stream          ? s.interleaved ? &Job::template rotate<true, true> : &Job::template rotate<true, false>
      : s.interleaved ? &Job::template rotate<false, true>
                      : &Job::template rotate<false, false>;
  parallel_for(s.batch * s.rows, s.elements(), threads,
               [&](int64_t begin, int64_t end) { (job.*rows)(begin, end); });
}

}  // namespace

void rotary(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
            const RotaryShape& shape, int threads) {
  with_types(shape.dtype, shape.table_dtype, [&](auto type, auto table_type) {
    rotate<decltype(type), decltype(table_type)>(x, cos, sin, offsets, out, shape, threads);
  });
}

}  // namespace lspm::cpu
