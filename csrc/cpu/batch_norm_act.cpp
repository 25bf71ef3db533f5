// Batch norm over rows with a residual addition and an activation (Ioffe and Szegedy 2015). A thread owns
// whole runs of rows; four rows at a time meet what is known of their channels, which stays in the
// first-level cache. Statistics are sums of deviations from the mean of a run's first rows, so a large mean
// cancels nothing; what runs found is put together in double (Chan, Golub and LeVeque 1979). Bytes per
// element, in sizes of T: statistics 1, forward 2, sums 2, backward 3; a residual adds 1 to the last three
// and its gradient 1 to the sums.
#include "batch_norm_act.h"

#include <cmath>
#include <memory>
#include <numeric>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

using Shape = BatchNormActShape;
constexpr int64_t kUnit = 2 * kLanes;  // elements of a pair of vectors
constexpr int kTogether = 4;           // rows that are computed side by side

// Rows of few channels are taken as longer ones, which fill whole vectors: a line is `rows` rows, and its
// columns repeat the channels. What is known or found of columns stands twice: in the order in which pairs of
// T come apart, then, for a last line that is shorter, in that of memory.
struct Lines {
  static constexpr int64_t kFew = 512;
  static constexpr std::integral_constant<int, kTogether> kMany{};
  static constexpr std::integral_constant<int, 1> kOne{};

  int64_t channels, rows = 1;
  explicit Lines(int64_t channels) : channels(channels) {
    if (channels < kFew) rows = kUnit / std::gcd(channels, kUnit);
  }
  int64_t columns() const { return rows * channels; }
  int64_t size() const { return 2 * columns(); }  // of what stands twice
  int64_t count(int64_t all_rows) const { return (all_rows + rows - 1) / rows; }

  // Puts values of channels, the first of these columns, under all columns.
  template <class T>
  __attribute__((noinline)) void spread(float* values) const {
    for (int64_t i = channels; i < size(); ++i) values[i] = values[i - channels];
    for_each_pair<T>(0, columns(),
                     [&](int64_t i, auto lanes) { lanes.store(values + i, lanes.load_ordered(values + i)); });
  }
  // The way back: the first columns become the sums over each channel's columns.
  template <class T>
  __attribute__((noinline)) void fold(float* values) const {
    for_each_pair<T>(0, columns(),
                     [&](int64_t i, auto lanes) { lanes.store_ordered(values + i, lanes.load(values + i)); });
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = c; i < size(); i += channels) total += values[i];
      values[c] = float(total);
    }
  }

  // Calls body(n, at, i, lanes) for all elements of rows [from, to): n lines, a constant, begin columns()
  // apart with the elements of `lanes` at `at`; what stands of their columns is at i.
  template <class T, class Body>
  void walk(int64_t from, int64_t to, Body body) const {
    const int64_t all = columns(), end = to * channels;
    int64_t at = from * channels;
    for (; at + kTogether * all <= end; at += kTogether * all)
      for_each_pair<T>(0, all, [&](int64_t i, auto lanes) { body(kMany, at + i, i, lanes); });
    for (; at + all <= end; at += all)
      for_each_pair<T>(0, all, [&](int64_t i, auto lanes) { body(kOne, at + i, i, lanes); });
    for_each_vector(end - at, [&](int64_t i, auto lanes) {
      body(kOne, at + i, all + i, Single<T, decltype(lanes)>(lanes));
    });
  }
  // The same of whole lines of whole pairs alone, as streamed ones are; returns the row that follows them.
  template <class T, class Body>
  int64_t walk_whole(int64_t from, int64_t to, Body body) const {
    const int64_t all = columns(), end = to * channels;
    int64_t at = from * channels;
    for (; at + kTogether * all <= end; at += kTogether * all)
      for_each_whole_pair<T>(0, all, [&](int64_t i, auto lanes) { body(kMany, at + i, i, lanes); });
    for (; at + all <= end; at += all)
      for_each_whole_pair<T>(0, all, [&](int64_t i, auto lanes) { body(kOne, at + i, i, lanes); });
    return at / channels;
  }
};

// Elements from where a tensor is read to where it is fetched.
template <class T>
constexpr int64_t kAhead = 4096 / sizeof(T);

// The sums of n vectors in pairs.
template <class V>
V total(const V (&v)[kTogether]) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}
template <class V>
V total(const V (&v)[1]) {
  return v[0];
}

// Adds v to a sum, whose rounding errors are kept behind it, `apart` floats further (Kahan 1965).
template <class V, class Lanes>
void add(float* sum, int64_t apart, V v, Lanes lanes) {
  const V before = lanes.load(sum), missing = v - lanes.load(sum + apart), after = before + missing;
  lanes.store(sum + apart, (after - before) - missing);
  lanes.store(sum, after);
}

template <class T>
void statistics_of_run(const T* x, int64_t from, int64_t to, const Lines& lines, float* room,
                       float* partial) {
  const int64_t columns = lines.columns(), channels = lines.channels, n = to - from;
  float *const shift = room, *const sums = shift + lines.size(), *const squares = sums + lines.size();
  float *const means = partial + channels, *const deviations = means + channels;
  std::fill(partial, partial + 3 * channels, 0.0f);
  if (n <= 0) return;

  const int64_t first = std::min(n, 8 * lines.rows);
  std::fill(room, room + 3 * lines.size(), 0.0f);
  lines.walk<T>(from, from + first, [&](auto rows, int64_t at, int64_t i, auto lanes) {
    decltype(lanes.load(x)) v[rows];
    for (int r = 0; r < rows; ++r) v[r] = lanes.load(x + at + r * columns);
    lanes.store(shift + i, lanes.load(shift + i) + total(v));
  });
  lines.fold<T>(shift);
  for (int64_t c = 0; c < channels; ++c) means[c] = shift[c] = shift[c] / first;
  lines.spread<T>(shift);

  lines.walk<T>(from, to, [&](auto rows, int64_t at, int64_t i, auto lanes) {
    const auto s = lanes.load(shift + i);
    decltype(lanes.load(x)) v[rows], squared[rows];
    for (int r = 0; r < rows; ++r) {
      const T* const p = x + at + r * columns;
      v[r] = lanes.load(p) - s;
      squared[r] = v[r] * v[r];
      fetch(p, kAhead<T>);
    }
    lanes.store(sums + i, lanes.load(sums + i) + total(v));
    lanes.store(squares + i, lanes.load(squares + i) + total(squared));
  });
  lines.fold<T>(sums);
  lines.fold<T>(squares);
  for (int64_t c = 0; c < channels; ++c) {
    const double sum = sums[c];
    partial[c] = float(n);
    means[c] = float(means[c] + sum / n);
    deviations[c] = float(std::max(squares[c] - sum * sum / n, 0.0));
  }
}

// Calls body(begin, n) for pieces of at most kPiece channels.
constexpr int64_t kPiece = 64;
template <class Body>
void for_pieces(const Shape& s, int threads, Body body) {
  parallel_for((s.channels + kPiece - 1) / kPiece, 3 * s.partials * s.channels, threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin * kPiece; begin < end; ++begin, c += kPiece)
                   body(c, std::min(kPiece, s.channels - c));
               });
}

void merge_statistics(const float* partial, float* mean, float* variance, const Shape& s, int threads) {
  for_pieces(s, threads, [&](int64_t begin, int64_t n) {
    double count[kPiece] = {}, center[kPiece] = {}, squares[kPiece] = {};
    const float* const runs = partial + begin;
    for (int64_t p = 0; p < s.partials; ++p) {
      const float *const counts = runs + 3 * p * s.channels, *const means = counts + s.channels;
      for (int64_t c = 0; c < n; ++c) {
        count[c] += counts[c];
        center[c] += double(counts[c]) * means[c];
      }
    }
    for (int64_t c = 0; c < n; ++c) center[c] /= std::max(count[c], 1.0);
    for (int64_t p = 0; p < s.partials; ++p) {
      const float *const counts = runs + 3 * p * s.channels, *const means = counts + s.channels;
      const float* const deviations = means + s.channels;
      for (int64_t c = 0; c < n; ++c) {
        const double between = means[c] - center[c];
        squares[c] += deviations[c] + counts[c] * between * between;
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      mean[begin + c] = float(center[c]);
      variance[begin + c] = float(squares[c] / std::max(count[c], 1.0));
    }
  });
}

double rstd_of(const BatchNormActChannels& channels, int64_t c, float eps) {
  return 1.0 / std::sqrt(double(channels.variance[c]) + eps);
}

// What is known of the channels, under each column of a line, in the order in which pairs of T come apart:
// y = (x - mean) * scale + shift and dx = (g - gradient - (x - mean) * projection) * scale.
template <class T>
class Columns {
 public:
  __attribute__((noinline)) Columns(const BatchNormActChannels& channels, const float* sums, const Shape& s,
                                    const Lines& lines)
      : size_(lines.size()), room_(new float[5 * size_]) {
    float* const at[5] = {&room_[0], &room_[size_], &room_[2 * size_], &room_[3 * size_], &room_[4 * size_]};
    for (int64_t c = 0; c < s.channels; ++c) {
      const double rstd = rstd_of(channels, c, s.eps);
      at[0][c] = channels.mean[c];
      at[1][c] = float(channels.weight ? channels.weight[c] * rstd : rstd);
      at[2][c] = channels.bias ? channels.bias[c] : 0.0f;
      at[3][c] = sums ? sums[c] / s.rows : 0.0f;
      at[4][c] = sums ? float(sums[s.channels + c] / s.rows * rstd) : 0.0f;
    }
    for (float* values : at) lines.spread<T>(values);
  }
  const float* mean() const { return &room_[0]; }
  const float* scale() const { return &room_[size_]; }
  const float* shift() const { return &room_[2 * size_]; }
  const float* gradient() const { return &room_[3 * size_]; }
  const float* projection() const { return &room_[4 * size_]; }

 private:
  int64_t size_;
  std::unique_ptr<float[]> room_;
};

template <class T, Activation kActivation>
struct Forward {
  const T *x, *residual;
  T* y;
  const Columns<T>& known;
  const Lines& lines;

  template <bool kStream>
  void rows(int64_t from, int64_t to) const {
    // Locals, as a store through a pointer may change a member as far as the compiler knows.
    const T *const x = this->x, *const residual = this->residual;
    T* const y = this->y;
    const float *const mean = known.mean(), *const scale = known.scale(), *const shift = known.shift();
    const int64_t columns = lines.columns();
    const auto body = [=](auto rows, int64_t at, int64_t i, auto lanes) {
      const auto m = lanes.load(mean + i), a = lanes.load(scale + i), b = lanes.load(shift + i);
      for (int r = 0; r < rows; ++r, at += columns) {
        auto z = (lanes.load(x + at) - m) * a + b;
        fetch(x + at, kAhead<T>);
        if (residual) {
          z += lanes.load(residual + at);
          fetch(residual + at, kAhead<T>);
        }
        write<kStream>(y + at, activated<kActivation>(z), lanes);
      }
    };
    if constexpr (kStream) {
      from = lines.walk_whole<T>(from, to, body);
      stream_fence();
      if (from < to) rows<false>(from, to);
    } else {
      lines.walk<T>(from, to, body);
    }
  }
};

template <class T, Activation kActivation>
struct Backward {
  const T *dy, *x, *beside;
  T* out;  // dresidual or dx
  const Columns<T>& known;
  const Lines& lines;
  bool constant;  // whether mean and variance are

  // The gradient before the activation and x - mean, of the elements at `at`.
  template <class V>
  struct Taken {
    V gradient, deviation;
  };
  template <class Lanes, class V>
  Taken<V> take(int64_t at, Lanes lanes, V m, V a, V b, bool reads_x) const {
    V g = lanes.load(dy + at), d{};
    fetch(dy + at, kAhead<T>);
    if (reads_x) {
      d = lanes.load(x + at) - m;
      fetch(x + at, kAhead<T>);
    }
    if constexpr (kActivation != Activation::none) {
      V z = d * a + b;
      if (beside) {
        const V other = lanes.load(beside + at);
        fetch(beside + at, kAhead<T>);
        if constexpr (kActivation == Activation::relu)
          z = other;  // y, which is positive where z is
        else
          z += other;
      }
      g = through<kActivation>(g, z);
    }
    return {g, d};
  }

  // stream: by a branch, which costs nothing measurable here, unlike in rows().
  void sums_of_run(int64_t from, int64_t to, float* gradients, float* products, bool stream) const {
    const Backward self = *this;
    const float *const mean = known.mean(), *const scale = known.scale(), *const shift = known.shift();
    const int64_t columns = lines.columns(), apart = lines.size();
    lines.walk<T>(from, to, [=](auto rows, int64_t at, int64_t i, auto lanes) {
      const auto m = lanes.load(mean + i), a = lanes.load(scale + i), b = lanes.load(shift + i);
      decltype(lanes.load(mean)) gradient[rows], product[rows];
      for (int r = 0; r < rows; ++r, at += columns) {
        const auto taken = self.take(at, lanes, m, a, b, true);
        if (stream)
          lanes.stream(self.out + at, taken.gradient);
        else if (self.out)
          lanes.store(self.out + at, taken.gradient);
        gradient[r] = taken.gradient;
        product[r] = taken.gradient * taken.deviation;
      }
      add(gradients + i, apart, total(gradient), lanes);
      add(products + i, apart, total(product), lanes);
    });
    if (stream) stream_fence();
  }

  template <bool kStream>
  void rows(int64_t from, int64_t to) const {
    const Backward self = *this;
    const float *const mean = known.mean(), *const scale = known.scale(), *const shift = known.shift();
    const float *const gradient = known.gradient(), *const projection = known.projection();
    const int64_t columns = lines.columns();
    constexpr bool kByOutput = kActivation == Activation::relu;
    const bool reads_x = !constant || (kActivation != Activation::none && !(kByOutput && beside));
    const auto body = [=](auto rows, int64_t at, int64_t i, auto lanes) {
      const auto m = lanes.load(mean + i), a = lanes.load(scale + i), b = lanes.load(shift + i);
      const auto g = lanes.load(gradient + i), p = lanes.load(projection + i);
      for (int r = 0; r < rows; ++r, at += columns) {
        const auto taken = self.take(at, lanes, m, a, b, reads_x);
        const auto v = self.constant ? taken.gradient : taken.gradient - g - taken.deviation * p;
        write<kStream>(self.out + at, v * a, lanes);
      }
    };
    if constexpr (kStream) {
      from = lines.walk_whole<T>(from, to, body);
      stream_fence();
      if (from < to) rows<false>(from, to);
    } else {
      lines.walk<T>(from, to, body);
    }
  }
};

// Calls body(from, to) for ranges of rows, whole lines but for the last.
template <class Body>
void for_rows(const Shape& s, const Lines& lines, int threads, Body body) {
  parallel_for(lines.count(s.rows), s.rows * s.channels, threads, [&](int64_t begin, int64_t end) {
    body(begin * lines.rows, std::min(end * lines.rows, s.rows));
  });
}

// Calls body(p, from, to, room) for every run of rows; room: 4 * size() floats for the thread that calls.
template <class Body>
void for_runs(const Shape& s, const Lines& lines, int threads, Body body) {
  if (!s.channels) return;  // a line would have no columns, and walk() no end
  const int64_t run = s.rows_per_partial();
  parallel_for(s.partials, s.rows * s.channels, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[4 * lines.size()]);
    for (int64_t p = begin; p < end; ++p)
      body(p, std::min(p * run, s.rows), std::min((p + 1) * run, s.rows), room.get());
  });
}

// Calls f(T{}) for the shape's element type.
template <class Call>
void with_type(const Shape& s, Call f) {
  if (s.dtype == DType::f32) return f(float{});
  return s.dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}
// Calls f(T{}, activation), both constants.
template <class Call>
void with_kernel(const Shape& s, Call f) {
  with_activation(s.activation, [&](auto activation) { with_type(s, [&](auto t) { f(t, activation); }); });
}

}  // namespace

void batch_norm_act_statistics(const void* x, float* partial, float* mean, float* variance, const Shape& s,
                               int threads) {
  if (x)
    with_type(s, [&](auto t) {
      using T = decltype(t);
      const Lines lines(s.channels);
      for_runs(s, lines, threads, [&](int64_t p, int64_t from, int64_t to, float* room) {
        statistics_of_run(static_cast<const T*>(x), from, to, lines, room, partial + 3 * p * s.channels);
      });
    });
  merge_statistics(partial, mean, variance, s, threads);
}

void batch_norm_act_forward(const void* x, const void* residual, const BatchNormActChannels& channels,
                            void* y, const Shape& s, int threads) {
  with_kernel(s, [&](auto t, auto activation) {
    using T = decltype(t);
    using Job = Forward<T, activation.value>;
    const Lines lines(s.channels);
    const Columns<T> known(channels, nullptr, s, lines);
    const Job job{static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), known,
                  lines};
    const bool stream = streams(job.y, s.rows * s.channels, lines.columns());
    const auto rows = stream ? &Job::template rows<true> : &Job::template rows<false>;
    for_rows(s, lines, threads, [&](int64_t from, int64_t to) { (job.*rows)(from, to); });
  });
}

void batch_norm_act_sums(const BatchNormActGradient& taken, const BatchNormActChannels& channels,
                         void* dresidual, float* partial, float* sums, const Shape& s, int threads) {
  with_kernel(s, [&](auto t, auto activation) {
    using T = decltype(t);
    using Job = Backward<T, activation.value>;
    const Lines lines(s.channels);
    const Columns<T> known(channels, nullptr, s, lines);
    const Job job{static_cast<const T*>(taken.dy),
                  static_cast<const T*>(taken.x),
                  static_cast<const T*>(taken.beside),
                  static_cast<T*>(dresidual),
                  known,
                  lines,
                  false};
    const bool stream = streams(job.out, s.rows * s.channels, lines.columns());
    for_runs(s, lines, threads, [&](int64_t p, int64_t from, int64_t to, float* room) {
      float *const gradients = room, *const products = room + 2 * lines.size();
      std::fill(room, room + 4 * lines.size(), 0.0f);
      job.sums_of_run(from, to, gradients, products, stream);
      for (int64_t i = 0; i < 4; ++i) lines.fold<T>(room + i * lines.size());
      float* const out = partial + 2 * p * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) {
        out[c] = gradients[c] - gradients[lines.size() + c];
        out[s.channels + c] = products[c] - products[lines.size() + c];
      }
    });
  });
  for_pieces(s, threads, [&](int64_t begin, int64_t n) {
    double gradients[kPiece] = {}, products[kPiece] = {};
    for (int64_t p = 0; p < s.partials; ++p) {
      const float *const run = partial + 2 * p * s.channels + begin, *const other = run + s.channels;
      for (int64_t c = 0; c < n; ++c) {
        gradients[c] += run[c];
        products[c] += other[c];
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      sums[begin + c] = float(gradients[c]);
      sums[s.channels + begin + c] = float(products[c] * rstd_of(channels, begin + c, s.eps));
    }
  });
}

void batch_norm_act_backward(const BatchNormActGradient& taken, const BatchNormActChannels& channels,
                             const float* sums, void* dx, const Shape& s, int threads) {
  with_kernel(s, [&](auto t, auto activation) {
    using T = decltype(t);
    using Job = Backward<T, activation.value>;
    const Lines lines(s.channels);
    const Columns<T> known(channels, sums, s, lines);
    const Job job{static_cast<const T*>(taken.dy),
                  static_cast<const T*>(taken.x),
                  static_cast<const T*>(taken.beside),
                  static_cast<T*>(dx),
                  known,
                  lines,
                  !sums};
    const bool stream = streams(job.out, s.rows * s.channels, lines.columns());
    const auto rows = stream ? &Job::template rows<true> : &Job::template rows<false>;
    for_rows(s, lines, threads, [&](int64_t from, int64_t to) { (job.*rows)(from, to); });
  });
}

}  // namespace lspm::cpu
