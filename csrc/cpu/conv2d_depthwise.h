// Grouped convolutions as depthwise ones: what their passes have in common.
//
// A vector holds kLanes filters, each of which reads channels of its own group alone. Depthwise, those are
// the pixel's channels as they lie. Otherwise a vector of them is permuted, so that each lane has channel d
// of its filter's group: a group of D channels is D depthwise convolutions, whose sums are added up, and no
// product is wasted on other groups' channels.
//
// kPixels pixels of the output stay in registers, side by side; a pixel of the input is loaded once for all
// taps of a row of the window. Where pixels lie is looked up, once for all channels: those outside are zeros.
#pragma once
#include <algorithm>

#include "cpu/correlation.h"
#include "cpu/pairs.h"

namespace lspm::cpu {

constexpr int kPixels = kLanes == 16 ? 7 : 4;
constexpr bool kGroups = kLanes > 4;  // whether there are kernels for groups of more than one channel
constexpr int kMostGroupTaps = 3;     // in a run of theirs

// What a lane reads: its own channel, or channels of its group; or pairs of them, of bfloat16.
enum class Reads { own, group, pairs };

// Two vectors one after the other, whatever T is.
template <class T>
struct TwoVectors : PairLanes<float> {
  Pair load(const T* p) const { return {lspm::load(p), lspm::load(p + kLanes)}; }
  Pair load_ordered(const float* p) const { return {lspm::load(p), lspm::load(p + kLanes)}; }
  void store(T* p, Pair v) const {
    lspm::store(p, v.first);
    lspm::store(p + kLanes, v.second);
  }
};

// Filters that are computed together: two vectors, one, or the first n lanes of one. Their weights begin at
// `slot`, which counts lanes of all bodies.
struct Body {
  int64_t slot, filter, lanes;
};

class Depthwise {
 public:
  // Taps side by side in a row of the window.
  struct Run {
    int64_t row, column;
    std::vector<int64_t> filters;
  };

  // Whether a correlation is for these kernels; nothing of the images' size matters.
  static bool admits(const Correlation& c) {
    if (c.groups == 1) return false;
    if (c.depth == 1 && c.filters == 1) return true;
    if (!kGroups || c.depth > kMostChannels || c.channels < 2 * kLanes) return false;
    return c.filters % kLanes == 0 || (c.filters < kLanes && c.depth <= kLanes);
  }

  // paired: products of bfloat16 go two at a time, where they can.
  Depthwise(const Correlation& correlation, bool paired) : c(correlation) {
    all_ = c.groups * c.filters;
    reads = c.depth == 1 && c.filters == 1 ? Reads::own
            : paired && c.depth % 2 == 0   ? Reads::pairs
                                           : Reads::group;
    depth = reads == Reads::pairs ? c.depth / 2 : c.depth;
    if (reads == Reads::own)
      own_bodies();
    else
      group_bodies();
    make_runs();
  }

  int64_t reach(int64_t pixels) const { return (pixels - 1) * stride + taps; }
  int64_t weights_of_lane() const { return int64_t(runs.size()) * depth * taps; }
  int64_t packed() const { return lanes_ * weights_of_lane(); }
  // Lanes of a body that are the body's before it, too; these two must be one thread's.
  int64_t seen_before(const Body& body) const {
    return reads == Reads::own && body.slot >= kLanes ? body.slot - body.filter : 0;
  }
  // The first body of a chunk of them.
  int64_t first_body(int64_t chunk, int64_t chunks) const {
    const int64_t n = bodies.size(), whole = seen_before(bodies[n - 1]) ? n - 1 : n;
    return chunk == chunks ? n : whole * chunk / chunks;
  }

  const Correlation& c;
  Reads reads;
  int64_t depth;         // channels, or pairs of them, that a filter reads of a pixel
  int64_t taps, stride;  // in a run; and pixels of the input between points, as they are looked up
  std::vector<Run> runs;
  std::vector<Body> bodies;

  // Where the vector of input for step d of the vector at `slot` begins, and which of its lanes are read.
  int64_t from(int64_t slot, int64_t d) const { return vectors_[slot / kLanes].from[d]; }
  const uint32_t* order(int64_t slot, int64_t d) const {
    return vectors_[slot / kLanes].order->data() + d * kLanes;
  }

 private:
  static constexpr int64_t kMostChannels = 8;  // of a group; from 16 on, dense tiles are as fast (measured)

  struct Vector {
    std::vector<int64_t> from;
    std::shared_ptr<const std::vector<uint32_t>> order;
  };

  void own_bodies() {
    int64_t at = 0;
    for (; at + 2 * kLanes <= all_; at += 2 * kLanes) bodies.push_back({at, at, 2 * kLanes});
    for (; at < all_; at += kLanes)  // the last vector reaches back over the one before it
      bodies.push_back(
          {at, std::max<int64_t>(0, std::min(at, all_ - kLanes)), std::min<int64_t>(kLanes, all_)});
    lanes_ = at;
  }

  // A vector holds as many whole groups, or such a part of one, that its input fits a vector too.
  void group_bodies() {
    const int64_t fits = std::max<int64_t>(1, std::min(kLanes / c.filters, kLanes / depth));
    const int64_t lanes = std::min<int64_t>(kLanes, fits * c.filters), unit = reads == Reads::pairs ? 2 : 1;
    const int64_t units = c.channels / unit;
    std::shared_ptr<const std::vector<uint32_t>> order;
    std::vector<int64_t> last;  // offsets within the input's vector, from which the order was made
    for (int64_t filter = 0; filter < all_; filter += lanes) {
      const int64_t n = std::min(lanes, all_ - filter), first = filter / c.filters * depth;
      Vector v;
      std::vector<int64_t> offsets;
      for (int64_t d = 0; d < depth; ++d) {
        const int64_t wanted = first + d / kLanes * kLanes;
        v.from.push_back(std::min(wanted, units - kLanes) * unit);
        offsets.push_back(first + d - v.from.back() / unit);
      }
      if (!order || offsets != last) {
        std::vector<uint32_t> made(depth * kLanes);
        for (int64_t d = 0; d < depth; ++d)
          for (int64_t i = 0; i < n; ++i)
            made[d * kLanes + i] = uint32_t(offsets[d] + (filter + i) / c.filters * depth - first);
        order = std::make_shared<const std::vector<uint32_t>>(std::move(made));
        last = n == lanes ? offsets : std::vector<int64_t>();
      }
      v.order = order;
      vectors_.push_back(std::move(v));
      if (n == kLanes && !bodies.empty() && bodies.back().lanes == kLanes)
        bodies.back().lanes = 2 * kLanes;
      else
        bodies.push_back({int64_t(vectors_.size() - 1) * kLanes, filter, n});
    }
    lanes_ = int64_t(vectors_.size()) * kLanes;
  }

  // As many taps to a run as divide each row of them; one where rows have gaps or there is no such kernel.
  void make_runs() {
    std::vector<Tap> sorted = c.taps;
    std::sort(sorted.begin(), sorted.end(), [](const Tap& a, const Tap& b) {
      return a.row != b.row ? a.row < b.row : a.column < b.column;
    });
    const int64_t n = sorted.size();
    int64_t in_row = 1;
    while (in_row < n && sorted[in_row].row == sorted[0].row) ++in_row;
    for (int64_t t = 0; t < n; ++t)
      if (n % in_row || sorted[t].row != sorted[t / in_row * in_row].row ||
          sorted[t].column != sorted[t / in_row * in_row].column + t % in_row)
        in_row = 1;
    taps = 1;
    if (bodies.empty() || bodies[0].lanes >= kLanes || reads != Reads::own)
      for (const int64_t many : {2, 3, 4, 5, 7})
        if (in_row % many == 0 && has_kernel(many)) taps = many;
    stride = taps == 1 ? 1 : c.stride_w;
    for (int64_t t = 0; t < n; t += taps) {
      runs.push_back({sorted[t].row, sorted[t].column, {}});
      for (int64_t i = 0; i < taps; ++i) runs.back().filters.push_back(sorted[t + i].filter);
    }
  }
  bool has_kernel(int64_t many) const {
    if (reads != Reads::own && many > kMostGroupTaps) return false;
    return c.stride_w == 1 || (c.stride_w == 2 && many % 2 == 1);
  }

  int64_t all_, lanes_;
  std::vector<Vector> vectors_;
};

// Calls f(taps, stride) with what the runs have of them as constants.
template <class Call>
void with_runs(const Depthwise& plan, Call f) {
  const auto at = [&](auto taps, auto stride) {
    if (plan.taps == taps.value && plan.stride == stride.value) f(taps, stride);
  };
  using std::integral_constant;
  constexpr integral_constant<int, 1> one;
  constexpr integral_constant<int, 2> two;
  at(one, one), at(two, one), at(integral_constant<int, 3>(), one), at(integral_constant<int, 3>(), two);
  at(integral_constant<int, 4>(), one);
  at(integral_constant<int, 5>(), one), at(integral_constant<int, 5>(), two);
  at(integral_constant<int, 7>(), one), at(integral_constant<int, 7>(), two);
}

// Where the input lies that some pixels of a row of the output read: of each run that meets the image, its
// number and `reach` pixels.
template <class T>
class Places {
 public:
  explicit Places(const Depthwise& plan)
      : plan_(plan), zeros_(plan.c.channels + 4 * kLanes), at_(plan.runs.size() * plan.reach(kPixels)) {
    std::fill_n(zeros_.get(), plan.c.channels + 4 * kLanes, T{});
    numbers_.reserve(plan.runs.size());
  }

  void find(const T* image, int64_t row, int64_t first, int64_t pixels) {
    const Correlation& c = plan_.c;
    const int64_t reach = plan_.reach(pixels), apart = plan_.taps == 1 ? c.stride_w : 1;
    numbers_.clear();
    const T** to = at_.data();
    for (const Depthwise::Run& run : plan_.runs) {
      const int64_t in_row = row * c.stride_h + run.row, column = first * c.stride_w + run.column;
      if (in_row < 0 || in_row >= c.height) continue;
      const T* const pixel = image + (in_row * c.width + column) * c.channels;
      const int64_t step = apart * c.channels;
      if (column >= 0 && column + (reach - 1) * apart < c.width)
        for (int64_t j = 0; j < reach; ++j) to[j] = pixel + j * step;
      else
        for (int64_t j = 0; j < reach; ++j) {
          const int64_t here = column + j * apart;
          to[j] = here >= 0 && here < c.width ? pixel + j * step : zeros_.get();
        }
      to += reach;
      numbers_.push_back(&run - plan_.runs.data());
    }
  }

  const std::vector<int64_t>& runs() const { return numbers_; }
  const T* const* pixels() const { return at_.data(); }

 private:
  const Depthwise& plan_;
  const Room<T> zeros_;
  std::vector<const T*> at_;
  std::vector<int64_t> numbers_;
};

// What the lanes of a body read.
template <class T, class Lanes>
struct OwnChannels {
  using V = decltype(Lanes().load(static_cast<const float*>(nullptr)));
  Lanes lanes;
  int64_t filter;

  auto reader(int64_t) const {
    return [this](const T* pixel) { return lanes.load(pixel + filter); };
  }
  auto weight(const float* w) const { return lanes.load(w); }
};

template <class T, class Lanes, bool kPairs>
struct GroupChannels {
  using V = decltype(Lanes().load_ordered(static_cast<const float*>(nullptr)));
  using Element = std::conditional_t<kPairs, float, T>;  // what a lane is read from
  Lanes lanes;
  const Depthwise& plan;
  int64_t slot;

  auto reader(int64_t d) const {
    const auto one = [&](int64_t at) {
      U order;
      std::memcpy(&order, plan.order(at, d), sizeof order);
      return [order, from = plan.from(at, d)](const T* pixel) {
        return __builtin_shuffle(load(reinterpret_cast<const Element*>(pixel + from)), order);
      };
    };
    if constexpr (sizeof(V) > sizeof(F))
      return [a = one(slot), b = one(slot + kLanes)](const T* pixel) { return Pair{a(pixel), b(pixel)}; };
    else
      return one(slot);
  }
  static V weight(const float* w) {
    if constexpr (sizeof(V) > sizeof(F))
      return {load(w), load(w + kLanes)};
    else
      return load(w);
  }
};

// Adds products, lane by lane: of floats, or of pairs of bfloat16, two to a lane.
template <bool kPairs>
inline void add_products(F& sum, F a, F b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return add_product(sum, reinterpret_cast<U>(a), reinterpret_cast<U>(b));
#endif
  sum += a * b;
}
template <bool kPairs>
inline void add_products(Pair& sum, Pair a, Pair b) {
  add_products<kPairs>(sum.first, a.first, b.first);
  add_products<kPairs>(sum.second, a.second, b.second);
}

// Calls f(columns) with the lanes of a body and what they read. Less than a vector has runs of one tap.
template <class T, Reads kReads, int kTaps, class Call>
__attribute__((always_inline)) inline void with_columns(const Depthwise& plan, const Body& body, Call f) {
  const int n = int(body.lanes);
  if constexpr (kReads == Reads::own) {
    if (n == 2 * kLanes) return f(OwnChannels<T, PairLanes<T>>{{}, body.filter});
    if (n == kLanes) return f(OwnChannels<T, Single<T, AllLanes>>{Single<T, AllLanes>(), body.filter});
    if constexpr (kTaps == 1) f(OwnChannels<T, Single<T, FirstLanes>>{Single<T, FirstLanes>(n), body.filter});
  } else {
    constexpr bool kPairs = kReads == Reads::pairs;
    if (n == 2 * kLanes) return f(GroupChannels<T, TwoVectors<T>, kPairs>{{}, plan, body.slot});
    f(GroupChannels<T, Single<T, FirstLanes>, kPairs>{Single<T, FirstLanes>(n), plan, body.slot});
  }
}

// The gradient of weight; a file of its own.
template <class T>
void depthwise_backward_weight(const T* dz, const T* x, T* dweight, const Conv2dShape& shape, int threads);
// The others, as conv2d.h has them.
template <class T>
void depthwise_forward(const T* x, const T* weight, const void* packed, const Conv2dEpilogue& epilogue, T* y,
                       const Conv2dShape& shape, int threads);
template <class T>
void depthwise_backward_data(const T* dz, const T* weight, T* dx, const Conv2dShape& shape, int threads);
template <class T>
int64_t depthwise_packed_bytes(const Conv2dShape& shape);
template <class T>
void depthwise_pack(const T* weight, void* packed, const Conv2dShape& shape, int threads);

}  // namespace lspm::cpu
