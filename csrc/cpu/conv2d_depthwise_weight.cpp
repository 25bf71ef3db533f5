// The gradient of the weight of depthwise and grouped convolutions.
//
// A sum over pixels for each tap, lane by lane as in the forward. Rows of the output are split into parts,
// whose number depends on the shape alone; a thread owns a part and some channels, whose sums lie in the
// first-level cache. Sums of kPixels pixels are taken in registers, then added to the part's; those of the
// parts are added up in order.
#include "cpu/conv2d_depthwise.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kPartPixels = 1568;     // at least in a part
constexpr int64_t kParts = 16;            // at most, and as
constexpr int64_t kPartBytes = 16 << 20;  // all parts' sums may be this large
constexpr int64_t kSumBytes = 24 << 10;   // of the bodies that go together
constexpr int64_t kItems = 16;            // at least, where there are so many, for threads to share

// Adds what some pixels of a row of dz give to the sums of some bodies, [run][depth][tap][lane] of each.
template <int kCount, class T, Reads kReads, int kTaps, int kStride>
void add_pixels(const Depthwise& plan, const T* image, const T* dz, int64_t row, int64_t first,
                const Body* begin, const Body* end, float* sums, Places<T>& places) {
  constexpr int kReach = (kCount - 1) * kStride + kTaps;
  places.find(image, row, first, kCount);
  const int64_t of_lane = plan.weights_of_lane(), depth = kReads == Reads::own ? 1 : plan.depth;
  const int64_t pixel = plan.c.out_pixel;
  for (const Body* body = begin; body != end; ++body)
    with_columns<T, kReads, kTaps>(plan, *body, [&](auto columns) __attribute__((always_inline)) {
      using V = typename decltype(columns)::V;
      constexpr int kWidth = sizeof(V) / sizeof(float);
      V g[kCount];
#pragma GCC unroll 8
      for (int p = 0; p < kCount; ++p) g[p] = columns.lanes.load(dz + p * pixel + body->filter);
      const T* const* at = places.pixels();
      for (const int64_t run : places.runs()) {
        float* to = sums + body->slot * of_lane + run * depth * kTaps * kWidth;
        for (int64_t d = 0; d < depth; ++d, to += kTaps * kWidth) {
          const auto read = columns.reader(d);
          V found[kTaps] = {};
#pragma GCC unroll 32
          for (int j = 0; j < kReach; ++j) {
            const V x = read(at[j]);
#pragma GCC unroll 8
            for (int s = 0; s < kTaps; ++s)
              if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kCount)
                add_products<false>(found[s], x, g[(j - s) / kStride]);
          }
#pragma GCC unroll 8
          for (int s = 0; s < kTaps; ++s) {
            const V sum = columns.weight(to + s * kWidth) + found[s];
            if constexpr (sizeof(V) > sizeof(F))
              store(to + s * kWidth, sum.first), store(to + s * kWidth + kLanes, sum.second);
            else
              columns.lanes.store(to + s * kWidth, sum);
          }
        }
        at += kReach;
      }
    });
}

template <class T, Reads kReads, int kTaps, int kStride>
void add_row(const Depthwise& plan, const T* image, const T* dz, int64_t row, const Body* begin,
             const Body* end, float* sums, Places<T>& places) {
  const int64_t columns = plan.c.columns, pixel = plan.c.out_pixel;
  int64_t j = 0;  // no pixel is taken that is not there: its zeros would meet what may be infinite
  for (; j + kPixels <= columns; j += kPixels)
    add_pixels<kPixels, T, kReads, kTaps, kStride>(plan, image, dz + j * pixel, row, j, begin, end, sums,
                                                   places);
  for (; j + 2 <= columns; j += 2)
    add_pixels<2, T, kReads, kTaps, kStride>(plan, image, dz + j * pixel, row, j, begin, end, sums, places);
  if (j < columns)
    add_pixels<1, T, kReads, kTaps, kStride>(plan, image, dz + j * pixel, row, j, begin, end, sums, places);
}

template <class T>
using Row = void (*)(const Depthwise&, const T*, const T*, int64_t, const Body*, const Body*, float*,
                     Places<T>&);

template <class T>
Row<T> row_of(const Depthwise& plan) {
  Row<T> found = nullptr;
  with_runs(plan, [&](auto taps, auto stride) {
    constexpr int kTaps = taps.value, kStride = stride.value;
    if (plan.reads == Reads::own) found = &add_row<T, Reads::own, kTaps, kStride>;
    if constexpr (kGroups && kTaps <= kMostGroupTaps)
      if (plan.reads == Reads::group) found = &add_row<T, Reads::group, kTaps, kStride>;
  });
  return found;
}

template <class T>
T from_float(float v) {
  T lanes[kLanes];
  store(lanes, broadcast(v));
  return lanes[0];
}

// A body's sums, as the gradient.
template <class T>
void finish(const Depthwise& plan, const Body& body, float* sums, T* dweight) {
  const Correlation& c = plan.c;
  const int64_t width = body.lanes > kLanes ? 2 * kLanes : kLanes;
  if (plan.reads == Reads::own && width == 2 * kLanes)
    for (int64_t i = 0; i < width * plan.weights_of_lane(); i += width) {
      const PairLanes<T> lanes;
      lanes.store_ordered(sums + i, lanes.load(sums + i));
    }
  for (int64_t i = plan.seen_before(body); i < body.lanes; ++i) {
    const int64_t filter = body.filter + i;
    T* const of = dweight + filter / c.filters * c.group_stride + filter % c.filters * c.filter_stride;
    const float* at = sums + i;
    for (const Depthwise::Run& run : plan.runs)
      for (int64_t d = 0; d < plan.depth; ++d)
        for (const int64_t tap : run.filters) {
          of[tap + d * c.depth_stride] = from_float<T>(*at);
          at += width;
        }
  }
}

}  // namespace

template <class T>
void depthwise_backward_weight(const T* dz, const T* x, T* dweight, const Conv2dShape& s, int threads) {
  const Correlation c = sums_over_x(s);
  const Depthwise plan(c, false);
  const Row<T> add = row_of<T>(plan);
  const int64_t rows = c.batch * c.rows, size = plan.packed(), bodies = plan.bodies.size();
  const int64_t image_size = c.height * c.width * c.channels;
  const int64_t parts = std::max<int64_t>(
      1, std::min({kParts, rows, c.grid() / kPartPixels, kPartBytes / int64_t(sizeof(float)) / size}));
  const int64_t chunks = std::clamp<int64_t>(
      std::max(size * int64_t(sizeof(float)) / kSumBytes, (kItems + parts - 1) / parts), 1, bodies);
  const Room<float> sums(parts * size);
  const int64_t work = c.grid() * c.groups * c.filters * (1 + plan.weights_of_lane() / 8);
  parallel_claim(parts * chunks, work, threads, [&](auto next, int) {
    Places<T> places(plan);
    for (int64_t item; (item = next()) < parts * chunks;) {
      const int64_t part = item / chunks, chunk = item % chunks;
      const Body* const begin = &plan.bodies[bodies * chunk / chunks];
      const Body* const end = plan.bodies.data() + bodies * (chunk + 1) / chunks;
      float* const own = sums.get() + part * size;
      const int64_t from = begin->slot * plan.weights_of_lane();
      const int64_t to = end == plan.bodies.data() + bodies ? size : end->slot * plan.weights_of_lane();
      std::fill(own + from, own + to, 0.0f);
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
        add(plan, x + row / c.rows * image_size, dz + row * c.out_row, row % c.rows, begin, end, own, places);
    }
  });
  parallel_for(bodies, parts * size, threads, [&](int64_t begin, int64_t end) {
    for (const Body* body = &plan.bodies[begin]; body != plan.bodies.data() + end; ++body) {
      float* const total = sums.get() + body->slot * plan.weights_of_lane();
      const int64_t n = (body->lanes > kLanes ? 2 * kLanes : kLanes) * plan.weights_of_lane();
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < n; i += kLanes)
          store(total + i, load(total + i) + load(total + part * size + i));
      finish(plan, *body, total, dweight);
    }
  });
}

template void depthwise_backward_weight(const float*, const float*, float*, const Conv2dShape&, int);
template void depthwise_backward_weight(const bf16*, const bf16*, bf16*, const Conv2dShape&, int);
template void depthwise_backward_weight(const f16*, const f16*, f16*, const Conv2dShape&, int);

}  // namespace lspm::cpu
