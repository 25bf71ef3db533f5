// Depthwise and grouped convolutions, with their epilogue, and the gradient of their input.
//
// A thread owns rows of the output; of kPixels pixels of one it computes all channels, a pair of vectors at a
// time, straight from the image, whose rows stay in the second-level cache for the next row of the output.
// The gradient of x goes by phases of the stride, as conv2d.cpp has it, whose rows take turns.
// Bytes per element, depthwise, in sizes of T: one each of x and y.
#include "cpu/conv2d_depthwise.h"

#include <limits>

#include "cpu/activation.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kItems = 16;             // at least, where there are so many, for threads to share
constexpr int64_t kLargeImages = 1 << 18;  // elements that are no longer in the second-level cache

#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPaired = std::is_same_v<T, bf16>;
#else
template <class>
constexpr bool kPaired = false;
#endif

// The activations that are more than a bound.
__attribute__((noinline)) void activate(F* v, int64_t n, Activation activation) {
  with_activation(activation, [&](auto kind) {
    for (int64_t i = 0; i < n; ++i) v[i] = activated<kind.value>(v[i]);
  });
}

F within(F v, float low, float high) {
  const F raised = max(broadcast(low), v);  // a NaN stays one
  return raised > high ? broadcast(high) : raised;
}
Pair within(Pair v, float low, float high) {
  return {within(v.first, low, high), within(v.second, low, high)};
}

template <class T>
struct Finish {
  const float *scale, *shift;
  const T* residual;
  Activation activation;

  // The sums of `count` pixels, which lie `pixel` apart, as y.
  template <class V, class Lanes>
  __attribute__((always_inline)) void write(V (&v)[kPixels], int64_t count, const Lanes& lanes,
                                            int64_t filter, T* y, int64_t out, int64_t pixel) const {
    const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p)
        if (p < count) f(v[p], out + p * pixel + filter);
    };
    if (scale) {
      const V by = lanes.load_ordered(scale + filter);
      each([&](V& sum, int64_t) { sum = sum * by; });
    }
    if (shift) {
      const V by = lanes.load_ordered(shift + filter);
      each([&](V& sum, int64_t) { sum = sum + by; });
    }
    if (residual) each([&](V& sum, int64_t at) { sum = sum + lanes.load(residual + at); });
    if (activation == Activation::relu || activation == Activation::relu6) {
      const float high = activation == Activation::relu6 ? 6.0f : std::numeric_limits<float>::infinity();
      each([&](V& sum, int64_t) { sum = within(sum, 0.0f, high); });
    } else if (activation != Activation::none) {
      V copy[kPixels];
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) copy[p] = v[p];
      activate(reinterpret_cast<F*>(copy), kPixels * sizeof(V) / sizeof(F), activation);
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) v[p] = copy[p];
    }
    each([&](V& sum, int64_t at) { lanes.store(y + at, sum); });
  }
};

// The sums of kPixels pixels over all runs that meet the image.
template <bool kPairs, int kTaps, int kStride, class T, class Columns, class V>
__attribute__((always_inline)) inline void add_runs(const Places<T>& places, int64_t depth,
                                                    const Columns& columns, const float* weights,
                                                    V (&sums)[kPixels]) {
  constexpr int kReach = (kPixels - 1) * kStride + kTaps, kWidth = sizeof(V) / sizeof(float);
  const T* const* at = places.pixels();
  for (const int64_t run : places.runs()) {
    const float* w = weights + run * depth * kTaps * kWidth;
    for (int64_t d = 0; d < depth; ++d, w += kTaps * kWidth) {
      const auto read = columns.reader(d);
      V taps[kTaps];
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) taps[s] = columns.weight(w + s * kWidth);
#pragma GCC unroll 32
      for (int j = 0; j < kReach; ++j) {
        const V x = read(at[j]);
#pragma GCC unroll 8
        for (int s = 0; s < kTaps; ++s)
          if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kPixels)
            add_products<kPairs>(sums[(j - s) / kStride], x, taps[s]);
      }
    }
    at += kReach;
  }
}

// Begins to bring lines of `bytes` from p on, which may be past the end of anything.
template <int kWrite>
void prefetch_lines(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, kWrite, 2);
}

// A row of the grid, for some bodies.
template <class T, Reads kReads, int kTaps, int kStride>
void add_row(const Depthwise& plan, const T* image, int64_t row, const Body* begin, const Body* end,
             const float* weights, const Finish<T>& finish, T* y, int64_t out, Places<T>& places) {
  const Correlation& c = plan.c;
  const int64_t of_lane = plan.weights_of_lane(), depth = kReads == Reads::own ? 1 : plan.depth;
  const bool ahead = end - begin == int64_t(plan.bodies.size()) && !plan.runs.empty() &&
                     c.grid() * c.channels > kLargeImages;
  for (int64_t first = 0; first < c.columns; first += kPixels, out += kPixels * c.out_pixel) {
    places.find(image, row, first, kPixels);
    const int64_t count = std::min<int64_t>(kPixels, c.columns - first);
    if (ahead) {  // below: of the rows that the next one adds; processors foresee no more than a line or two
      for (int64_t r = 1; r <= c.stride_h; ++r)
        if (const int64_t below = row * c.stride_h + plan.runs.back().row + r; below >= 0 && below < c.height)
          prefetch_lines<0>(image + (below * c.width + first * c.stride_w) * c.channels,
                            count * c.stride_w * c.channels * int64_t(sizeof(T)));
      prefetch_lines<1>(y + out + kPixels * c.out_pixel, count * c.out_pixel * int64_t(sizeof(T)));
    }
    for (const Body* body = begin; body != end; ++body)
      with_columns<T, kReads, kTaps>(plan, *body, [&](auto columns) __attribute__((always_inline)) {
        typename decltype(columns)::V sums[kPixels] = {};
        add_runs<kReads == Reads::pairs, kTaps, kStride>(places, depth, columns,
                                                         weights + body->slot * of_lane, sums);
        finish.write(sums, count, columns.lanes, body->filter, y, out, c.out_pixel);
      });
  }
}

template <class T>
using Row = void (*)(const Depthwise&, const T*, int64_t, const Body*, const Body*, const float*,
                     const Finish<T>&, T*, int64_t, Places<T>&);

template <class T>
Row<T> row_of(const Depthwise& plan) {
  Row<T> found = nullptr;
  with_runs(plan, [&](auto taps, auto stride) {
    constexpr int kTaps = taps.value, kStride = stride.value;
    if (plan.reads == Reads::own) found = &add_row<T, Reads::own, kTaps, kStride>;
    if constexpr (kGroups && kTaps <= kMostGroupTaps) {
      if (plan.reads == Reads::group) found = &add_row<T, Reads::group, kTaps, kStride>;
      if constexpr (kPaired<T>)
        if (plan.reads == Reads::pairs) found = &add_row<T, Reads::pairs, kTaps, kStride>;
    }
  });
  return found;
}

// The weights of each body: [run][depth][tap][lane].
template <class T>
void pack(const Depthwise& plan, const T* weight, float* to, int threads) {
  const Correlation& c = plan.c;
  const int64_t bodies = plan.bodies.size();
  parallel_for(bodies, plan.packed(), threads, [&](int64_t begin, int64_t end) {
    for (const Body* body = &plan.bodies[begin]; body != plan.bodies.data() + end; ++body) {
      const int64_t width = body->lanes > kLanes ? 2 * kLanes : kLanes;
      float* const block = to + body->slot * plan.weights_of_lane();
      if (body->lanes % kLanes) std::fill_n(block, width * plan.weights_of_lane(), 0.0f);
      for (int64_t i = 0; i < body->lanes; ++i) {
        const int64_t filter = body->filter + i;
        const T* of = weight + filter / c.filters * c.group_stride + filter % c.filters * c.filter_stride;
        float* at = block + i;
        for (const Depthwise::Run& run : plan.runs)
          for (int64_t d = 0; d < plan.depth; ++d)
            for (const int64_t tap : run.filters) {
              if (plan.reads == Reads::pairs) {
                const T pair[2] = {of[tap + 2 * d * c.depth_stride], of[tap + (2 * d + 1) * c.depth_stride]};
                std::memcpy(at, pair, std::min(sizeof pair, sizeof(float)));
              } else {
                *at = to_float(of[tap + d * c.depth_stride]);
              }
              at += width;
            }
      }
      if (plan.reads == Reads::own && width == 2 * kLanes)  // in the order that pairs of T come apart in
        for (int64_t i = 0; i < width * plan.weights_of_lane(); i += width) {
          const PairLanes<T> lanes;
          lanes.store(block + i, lanes.load_ordered(block + i));
        }
    }
  });
}

// The correlations' grids, which differ by a row at most, over one input, whose rows take turns.
template <class T>
void correlate(const std::vector<Depthwise>& plans, const T* x, const T* weight, const void* packed,
               const Finish<T>& finish, T* y, int threads) {
  std::vector<Room<float>> rooms;
  std::vector<const float*> weights;
  std::vector<Row<T>> rows;
  int64_t work = 0, most_rows = 0;
  for (const Depthwise& plan : plans) {
    rooms.emplace_back(packed ? 0 : plan.packed());
    if (!packed) pack(plan, weight, rooms.back().get(), threads);
    weights.push_back(packed ? static_cast<const float*>(packed) : rooms.back().get());
    rows.push_back(row_of<T>(plan));
    most_rows = std::max(most_rows, plan.c.rows);
    work += plan.c.grid() * plan.c.groups * plan.c.filters * (1 + plan.weights_of_lane() / 8);
  }
  const Correlation& c = plans[0].c;
  const int64_t in_block = std::clamp<int64_t>(c.batch * most_rows / kItems, 1, most_rows);
  const int64_t blocks = (most_rows + in_block - 1) / in_block, bodies = plans[0].bodies.size();
  const int64_t chunks = std::clamp<int64_t>(kItems / (c.batch * blocks), 1, bodies);
  const int64_t items = c.batch * blocks * chunks, image_size = c.height * c.width * c.channels;
  parallel_claim(items, work, threads, [&](auto next, int) {
    std::vector<std::unique_ptr<Places<T>>> places;
    for (const Depthwise& plan : plans) places.push_back(std::make_unique<Places<T>>(plan));
    for (int64_t item; (item = next()) < items;) {
      const int64_t chunk = item % chunks, block = item / chunks % blocks, image = item / chunks / blocks;
      for (int64_t row = block * in_block; row < std::min((block + 1) * in_block, most_rows); ++row)
        for (size_t i = 0; i < plans.size(); ++i) {
          const Correlation& phase = plans[i].c;
          if (row >= phase.rows || !phase.columns) continue;
          const Body* const first = plans[i].bodies.data();
          rows[i](plans[i], x + image * image_size, row, first + plans[i].first_body(chunk, chunks),
                  first + plans[i].first_body(chunk + 1, chunks), weights[i], finish, y,
                  phase.out_offset + image * phase.out_image + row * phase.out_row, *places[i]);
        }
    }
  });
}

}  // namespace

template <class T>
int64_t depthwise_packed_bytes(const Conv2dShape& s) {
  const Correlation c = sums_over_x(s);
  return Depthwise(c, kPaired<T>).packed() * int64_t(sizeof(float));
}

template <class T>
void depthwise_pack(const T* weight, void* packed, const Conv2dShape& s, int threads) {
  const Correlation c = sums_over_x(s);
  pack(Depthwise(c, kPaired<T>), weight, static_cast<float*>(packed), threads);
}

template <class T>
void depthwise_forward(const T* x, const T* weight, const void* packed, const Conv2dEpilogue& e, T* y,
                       const Conv2dShape& s, int threads) {
  const Correlation c = sums_over_x(s);
  std::vector<Depthwise> plans;
  plans.emplace_back(c, kPaired<T>);
  correlate(plans, x, weight, packed,
            Finish<T>{e.scale, e.shift, static_cast<const T*>(e.residual), e.activation}, y, threads);
}

template <class T>
void depthwise_backward_data(const T* dz, const T* weight, T* dx, const Conv2dShape& s, int threads) {
  std::vector<Correlation> phases;
  for (int64_t i = 0; i < std::min(s.stride_h, s.height); ++i)
    for (int64_t j = 0; j < std::min(s.stride_w, s.width); ++j) phases.push_back(sums_over_dz(s, i, j));
  std::vector<Depthwise> plans;
  plans.reserve(phases.size());
  for (const Correlation& c : phases) plans.emplace_back(c, kPaired<T>);
  correlate(plans, dz, weight, nullptr, Finish<T>{nullptr, nullptr, nullptr, Activation::none}, dx, threads);
}

#define INSTANTIATE(T)                                                                        \
  template int64_t depthwise_packed_bytes<T>(const Conv2dShape&);                             \
  template void depthwise_pack(const T*, void*, const Conv2dShape&, int);                     \
  template void depthwise_forward(const T*, const T*, const void*, const Conv2dEpilogue&, T*, \
                                  const Conv2dShape&, int);                                   \
  template void depthwise_backward_data(const T*, const T*, T*, const Conv2dShape&, int);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

}  // namespace lspm::cpu
