// Mean over the pixels of an image, channels last. A thread owns up to kChannels channels of an image, whose
// sums stay in the first-level cache; pixels go in eights, so that a sum is read and written once for eight,
// and the rounding errors of its additions are carried along. The backward writes one row of means again and
// again. Bytes per element of x, in sizes of T: 1 either way.
#include "global_avg_pool.h"

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kChannels = 1024;

// What was lost of a sum that is infinite is NaN, and no part of it.
F whole(F sum, F lost) { return lost == lost ? sum + lost : sum; }
Pair whole(Pair sum, Pair lost) { return {whole(sum.first, lost.first), whole(sum.second, lost.second)}; }

template <class T>
void add_pixels(const T* x, int64_t pixels, int64_t stride, int64_t channels, T* y) {
  float sums[kChannels] = {}, lost[kChannels] = {};
  const auto add = [&](const T* from, auto of_pixels) {
    for_each_pair<T>(0, channels, [&](int64_t c, auto lanes) {
      const auto term = of_pixels(from + c, lanes), sum = lanes.load(sums + c);
      const auto next = sum + term, seen = next - sum;  // Knuth's two-sum
      lanes.store(lost + c, lanes.load(lost + c) + ((sum - (next - seen)) + (term - seen)));
      lanes.store(sums + c, next);
    });
  };
  int64_t p = 0;
  for (; p + 8 <= pixels; p += 8)
    add(x + p * stride, [&](const T* from, auto lanes) {
      const auto of = [&](int64_t k) { return lanes.load(from + k * stride); };
      return ((of(0) + of(1)) + (of(2) + of(3))) + ((of(4) + of(5)) + (of(6) + of(7)));
    });
  for (; p < pixels; ++p) add(x + p * stride, [](const T* from, auto lanes) { return lanes.load(from); });
  for_each_pair<T>(0, channels, [&](int64_t c, auto lanes) {
    lanes.store(y + c, whole(lanes.load(sums + c), lanes.load(lost + c)) / float(pixels));
  });
}

template <class T>
void forward(const void* x, void* y, const GlobalAvgPoolShape& s, int threads) {
  const int64_t parts = (s.channels + kChannels - 1) / kChannels;
  parallel_for(s.batch * parts, s.batch * s.pixels * s.channels, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t image = begin / parts, first = begin % parts * kChannels;
      add_pixels(static_cast<const T*>(x) + image * s.pixels * s.channels + first, s.pixels, s.channels,
                 std::min(kChannels, s.channels - first), static_cast<T*>(y) + image * s.channels + first);
    }
  });
}

template <bool kStream, class T>
void spread(const T* dy, T* dx, const GlobalAvgPoolShape& s, int64_t begin, int64_t end) {
  for (; begin < end; ++begin)
    for_each_pair<T>(0, s.channels, [&](int64_t c, auto lanes) {
      const auto mean = lanes.load(dy + begin / s.pixels * s.channels + c) / float(s.pixels);
      write<kStream>(dx + begin * s.channels + c, mean, lanes);
    });
  if (kStream) stream_fence();
}

template <class T>
void backward(const void* dy, void* dx, const GlobalAvgPoolShape& s, int threads) {
  T* const out = static_cast<T*>(dx);
  const int64_t elements = s.batch * s.pixels * s.channels;
  const auto rows = streams(out, elements, s.channels) ? &spread<true, T> : &spread<false, T>;
  parallel_for(s.batch * s.pixels, elements, threads,
               [&](int64_t begin, int64_t end) { rows(static_cast<const T*>(dy), out, s, begin, end); });
}

}  // namespace

void global_avg_pool_forward(const void* x, void* y, const GlobalAvgPoolShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &forward<float>
                   : shape.dtype == DType::bf16 ? &forward<bf16>
                                                : &forward<f16>;
  run(x, y, shape, threads);
}

void global_avg_pool_backward(const void* dy, void* dx, const GlobalAvgPoolShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &backward<float>
                   : shape.dtype == DType::bf16 ? &backward<bf16>
                                                : &backward<f16>;
  run(dy, dx, shape, threads);
}

}  // namespace lspm::cpu
