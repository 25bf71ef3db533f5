// Max pooling of images, channels last. A thread owns whole rows of the output, and of dx in the backward.
// The taps of a window meet vectors of channels that stay in registers. The backward gathers: an element of
// dx adds the gradients of the windows that took it, in their order, so no two threads write to one place.
// Bytes per element of y, in sizes of T, where windows overlap in cache: forward stride ** 2 + 1 and one byte
// of positions; backward the same.
#include "max_pool2d.h"

#include <limits>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int kVectors = 4;  // of channels, that go through a window together

// 0, 1, ... in the types of a parameter, so that the body of a loop over it stands there once for each.
template <int... kIndices>
struct Indices {
  static constexpr int kCount = sizeof...(kIndices);
  template <class Body>
  __attribute__((always_inline)) static void each(Body body) {
    (body(kIndices), ...);
  }
};

// Calls body(c, lanes, vectors) for the vectors of n channels: kVectors of them at a time, then one by one.
template <class Body>
__attribute__((always_inline)) inline void for_each_group(int64_t n, Body body) {
  int64_t c = 0;
  for (; c + kVectors * kLanes <= n; c += kVectors * kLanes) body(c, AllLanes{}, Indices<0, 1, 2, 3>{});
  for_each_vector(n - c, [&](int64_t i, auto lanes) { body(c + i, lanes, Indices<0>{}); });
}

// Where a window lies along one dimension, with the taps [first, end) of it that are inside.
struct Window {
  int64_t start, first, end;
  Window(const PoolAxis& axis, int64_t at)
      : start(axis.start(at)), first(axis.first(at)), end(axis.end(at)) {}
};

template <class T, class P>
struct Forward {
  const T* x;
  T* y;
  P* positions;
  const MaxPool2dShape& shape;
  std::vector<Window> columns{};

  Forward(const T* x, T* y, P* positions, const MaxPool2dShape& s)
      : x(x), y(y), positions(positions), shape(s) {
    for (int64_t col = 0; col < s.cols.out; ++col) columns.emplace_back(s.cols, col);
  }

  // Of all images' rows of the output.
  template <bool kPositions>
  void rows(int64_t begin, int64_t end) const {
    const PoolAxis &h = shape.rows, &w = shape.cols;
    for (; begin < end; ++begin) {
      const Window a(h, begin % h.out);
      const T* const from = x + (begin / h.out * h.in + a.start) * w.in * shape.channels;
      for (int64_t col = 0; col < w.out; ++col)
        window<kPositions>(a, columns[col], from + columns[col].start * shape.channels,
                           (begin * w.out + col) * shape.channels);
    }
  }

  // corner: of tap (0, 0), which may lie outside: only what is added to it makes it an element.
  template <bool kPositions>
  void window(Window rows, Window cols, const T* corner, int64_t out) const {
    const int64_t kernel = shape.cols.kernel, across = shape.cols.dilation * shape.channels;
    const int64_t down = shape.rows.dilation * shape.cols.in * shape.channels;
    for_each_group(shape.channels, [&](int64_t c, auto lanes, auto vectors) {
      F best[vectors.kCount];
      U taken[vectors.kCount];
      vectors.each([&](int v) {
        best[v] = broadcast(-std::numeric_limits<float>::infinity());
        taken[v] = U{} + uint32_t(rows.first * kernel + cols.first);
      });
      for (int64_t a = rows.first; a < rows.end; ++a) {
        const T* from = corner + a * down + cols.first * across + c;
        for (int64_t b = cols.first; b < cols.end; ++b, from += across) {
          const U tap = U{} + uint32_t(a * kernel + b);
          vectors.each([&](int v) {
            const F value = lanes.load(from + v * kLanes);
            const auto larger = (value > best[v]) | (value != value);
            best[v] = larger ? value : best[v];
            if constexpr (kPositions) taken[v] = larger ? tap : taken[v];
          });
        }
      }
      vectors.each([&](int v) {
        lanes.store_unchanged(y + out + c + v * kLanes, best[v]);
        if constexpr (kPositions) lanes.store(positions + out + c + v * kLanes, taken[v]);
      });
    });
  }
};

// The windows that reach each element of a dimension, in order, with the tap that it is.
class Reaching {
 public:
  struct Tap {
    int64_t window, tap;
  };

  explicit Reaching(const PoolAxis& axis) : starts_(axis.in + 1) {
    for (int64_t element = 0; element < axis.in; ++element) {
      for (int64_t o = axis.first_window(element); o < axis.end_window(element); ++o)
        if (const int64_t tap = axis.tap(element, o); tap >= 0) taps_.push_back({o, tap});
      starts_[element + 1] = int64_t(taps_.size());
    }
  }
  const Tap* begin(int64_t element) const { return taps_.data() + starts_[element]; }
  const Tap* end(int64_t element) const { return begin(element + 1); }

 private:
  std::vector<int64_t> starts_;
  std::vector<Tap> taps_;
};

template <class T, class P>
struct Backward {
  const T* dy;
  const P* positions;
  T* dx;
  const MaxPool2dShape& shape;
  Reaching by_row{shape.rows}, by_col{shape.cols};

  // Of all images' rows of dx.
  void rows(int64_t begin, int64_t end) const {
    const PoolAxis &h = shape.rows, &w = shape.cols;
    for (; begin < end; ++begin) {
      const int64_t image = begin / h.in * h.out;
      const auto first = by_row.begin(begin % h.in), last = by_row.end(begin % h.in);
      for (int64_t col = 0; col < w.in; ++col)
        element(image, first, last, by_col.begin(col), by_col.end(col),
                dx + (begin * w.in + col) * shape.channels);
    }
  }

  // image: the first of its rows of y.
  void element(int64_t image, const Reaching::Tap* first_a, const Reaching::Tap* last_a,
               const Reaching::Tap* first_b, const Reaching::Tap* last_b, T* to) const {
    const int64_t channels = shape.channels, width = shape.cols.out, kernel = shape.cols.kernel;
    const T* const dy = this->dy;
    const P* const positions = this->positions;
    for_each_group(channels, [=](int64_t c, auto lanes, auto vectors) {
      F sum[vectors.kCount];
      vectors.each([&](int v) { sum[v] = F{}; });
      for (auto a = first_a; a != last_a; ++a)
        for (auto b = first_b; b != last_b; ++b) {
          const int64_t at = ((image + a->window) * width + b->window) * channels + c;
          const U tap = U{} + uint32_t(a->tap * kernel + b->tap);
          vectors.each([&](int v) {
            const F gradient = lanes.load(dy + at + v * kLanes);
            sum[v] += lanes.load(positions + at + v * kLanes) == tap ? gradient : F{};
          });
        }
      vectors.each([&](int v) { lanes.store(to + c + v * kLanes, sum[v]); });
    });
  }
};

template <class T, class P>
void forward(const void* x, void* y, void* positions, const MaxPool2dShape& s, int threads) {
  using Job = Forward<T, P>;
  const Job job{static_cast<const T*>(x), static_cast<T*>(y), static_cast<P*>(positions), s};
  const auto rows = positions ? &Job::template rows<true> : &Job::template rows<false>;
  parallel_for(s.batch * s.rows.out, s.inputs(), threads,
               [&](int64_t begin, int64_t end) { (job.*rows)(begin, end); });
}

template <class T, class P>
void backward(const void* dy, const void* positions, void* dx, const MaxPool2dShape& s, int threads) {
  const Backward<T, P> job{static_cast<const T*>(dy), static_cast<const P*>(positions), static_cast<T*>(dx),
                           s};
  prepare_output(job.dx, s.inputs());
  parallel_for(s.batch * s.rows.in, s.inputs(), threads,
               [&](int64_t begin, int64_t end) { job.rows(begin, end); });
}

// Calls body(T(), P()) for the types of elements and of positions.
template <class Body>
void with_types(const MaxPool2dShape& s, Body body) {
  const auto with = [&](auto t) { s.bytes() ? body(t, uint8_t()) : body(t, int32_t()); };
  s.dtype == DType::f32 ? with(float()) : s.dtype == DType::bf16 ? with(bf16()) : with(f16());
}

}  // namespace

void max_pool2d_forward(const void* x, void* y, void* positions, const MaxPool2dShape& shape, int threads) {
  with_types(shape,
             [&](auto t, auto p) { forward<decltype(t), decltype(p)>(x, y, positions, shape, threads); });
}

void max_pool2d_backward(const void* dy, const void* positions, void* dx, const MaxPool2dShape& shape,
                         int threads) {
  with_types(shape,
             [&](auto t, auto p) { backward<decltype(t), decltype(p)>(dy, positions, dx, shape, threads); });
}

}  // namespace lspm::cpu
