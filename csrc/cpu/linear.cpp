// Linear for few rows, as when a text is generated token by token: bound by reading the weight once.
//
// A thread takes blocks of as many rows of the weight as a vector has lanes. kOutputsAtOnce of these meet
// kRowsAtOnce rows of x, which lie in the cache as floats, in the order in which the weight's elements come
// apart (pairs.h), and their sums stay in registers; those of a block are added up together. Further rows of
// x find the block in the cache. Of more than kFewRows, as of a prompt, products are the bound: there a block
// is written out as floats first, and kRowsInCache rows of x meet it.
// Bytes: the weight once for these, rows of x once for each thread.
#include "linear.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/pairs.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

// Sums in registers, beside as many vectors of x. Fewer rows of x at once take turns with each output's
// weights, which are then in the first-level cache; more outputs at once share what is read of x.
constexpr int kRowsAtOnce = 4, kOutputsAtOnce = 4;

// Of more rows weights are unpacked once, not for each kRowsAtOnce of them.
constexpr int64_t kFewRows = 8;
// Of x, which stay in the second-level cache while block after block meets them.
constexpr int64_t kRowsInCache = 64;
constexpr int64_t kLeastBlocks = 2;  // that a thread takes: what it fetches ahead beyond them is in vain

int64_t blocks(const LinearShape& s) { return (s.outputs + kLanes - 1) / kLanes; }

// Calls body with a pointer to what `data` holds.
template <class Body>
auto with_type(const void* data, DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<const float*>(data));
    case DType::bf16:
      return body(static_cast<const bf16*>(data));
    default:
      return body(static_cast<const f16*>(data));
  }
}

// The rows of x as floats in the order in which vectors of W come apart, zeros behind each.
template <class W>
struct Rows {
  int64_t width;
  std::vector<float> floats;

  Rows(const void* x, const LinearShape& s)
      : width((s.inputs + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes)), floats(s.rows * width) {
    for (int64_t row = 0; row < s.rows; ++row) {
      float* const to = floats.data() + row * width;
      with_type(x, s.dtype, [&](auto* from) {
        for_each_vector(s.inputs, [&](int64_t i, auto lanes) {
          lanes.store(to + i, lanes.load(from + row * s.inputs + i));
        });
      });
      for_each_pair<W>(0, s.inputs, [&](int64_t i, auto lanes) {
        if constexpr (std::is_same_v<decltype(lanes), PairLanes<W>>)
          PairLanes<float>{}.store(to + i, lanes.load_ordered(to + i));
      });
    }
  }
};

template <class W>
struct Job {
  // Bytes from a line that is read to the one that is fetched: where rows are short, the next turn of
  // kOutputs rows would be too soon.
  static constexpr int64_t kFetched = 16 << 10;

  const Rows<W> x;
  const void* bias;
  const float* scales;
  void* y;
  const LinearShape& shape;

  // w: the block's weights.
  void of_block(const W* w, int64_t block, int64_t row, int64_t end) const {
    for (; row < end; row += kRowsAtOnce)
      of_rows(w, block * kLanes, row, std::min<int64_t>(end - row, kRowsAtOnce));
  }

  template <int kRows = kRowsAtOnce>
  void of_rows(const W* w, int64_t output, int64_t row, int64_t rows) const {
    if constexpr (kRows > 1)
      if (rows < kRows) return of_rows<kRows - 1>(w, output, row, rows);
    const int64_t outputs = std::min<int64_t>(kLanes, shape.outputs - output);
    F sums[kRows][kLanes] = {};
    int64_t n = 0;
    for (; n + kOutputsAtOnce <= outputs; n += kOutputsAtOnce)
      products<kOutputsAtOnce>(w + n * shape.weight_stride, output + n, n, row, sums);
    for (; n < outputs; ++n) products<1>(w + n * shape.weight_stride, output + n, n, row, sums);
    for (int r = 0; r < kRows; ++r) {
      const F all = sums_of(sums[r]);
      if (outputs == kLanes)
        write(row + r, output, all, AllLanes{});
      else
        write(row + r, output, all, FirstLanes{int(outputs)});
    }
  }

  template <int kOutputs, int kRows>
  void products(const W* w, int64_t output, int64_t n, int64_t row, F (&sums)[kRows][kLanes]) const {
    const float* const at = x.floats.data() + row * x.width;
    const int64_t turn = kOutputs * shape.weight_stride * int64_t(sizeof(W));
    const int64_t ahead = std::max<int64_t>(1, kFetched / std::max<int64_t>(1, turn));
    F parts[kOutputs][kRows] = {};
    const auto add = [&](F(&to)[kOutputs][kRows], int64_t i, auto lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) {
        const W* const from = w + o * shape.weight_stride + i;
        prefetch_far(from + ahead * kOutputs * shape.weight_stride);
        const auto v = lanes.load(from);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          add_product(to[o][r], v, stored<std::decay_t<decltype(v)>>(at + r * x.width + i));
      }
    };
    if (!scales || shape.groups == 1) {
      for_each_pair<W>(0, shape.inputs,
                       [&](int64_t i, auto lanes) __attribute__((always_inline)) { add(parts, i, lanes); });
    } else {
      const int64_t group = shape.group();
      const float* scale = scales + output * shape.groups;
      for (int64_t begin = 0; begin < shape.inputs; begin += group, ++scale) {
        F of_group[kOutputs][kRows] = {};
        for (int64_t i = begin; i < begin + group; i += 2 * kLanes) add(of_group, i, PairLanes<W>{});
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) parts[o][r] += of_group[o][r] * scale[o * shape.groups];
      }
    }
    for (int o = 0; o < kOutputs; ++o)
      for (int r = 0; r < kRows; ++r) sums[r][n + o] = parts[o][r];
  }

  template <class Lanes>
  void write(int64_t row, int64_t output, F sums, Lanes lanes) const {
    if (scales && shape.groups == 1) sums *= lanes.load(scales + output);
    if (bias) sums += with_type(bias, shape.bias_dtype, [&](auto* of) { return F(lanes.load(of + output)); });
    with_type(y, shape.dtype, [&](auto* of) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(of)>>;
      lanes.store(const_cast<T*>(of) + row * shape.outputs + output, sums);
    });
  }
};

// The weights of a block as floats, times their scales.
template <class W>
void unpack(const W* weight, const float* scales, const LinearShape& s, int64_t block, float* to,
            int64_t to_stride) {
  const int64_t group = s.group();
  for (int64_t n = block * kLanes; n < std::min(s.outputs, (block + 1) * kLanes); ++n, to += to_stride)
    for (int64_t k = 0; k < s.inputs; k += group) {
      const float scale = scales ? scales[n * s.groups + k / group] : 1;
      for_each_vector(group, [&](int64_t i, auto lanes) {
        lanes.store(to + k + i, lanes.load(weight + n * s.weight_stride + k + i) * scale);
      });
    }
}

// Few rows: each weight is read once, and taken as it is stored.
template <class W>
void read(const void* x, const W* weight, const void* bias, const float* scales, void* y,
          const LinearShape& s, int threads) {
  const Job<W> job{Rows<W>(x, s), bias, scales, y, s};
  parallel_share(blocks(s), s.outputs * s.inputs, kLeastBlocks, threads, [&](int64_t block, int64_t end) {
    for (; block < end; ++block) job.of_block(weight + block * kLanes * s.weight_stride, block, 0, s.rows);
  });
}

// More rows: kRowsInCache of them meet each block after it is unpacked.
template <class W>
void multiply(const void* x, const W* weight, const void* bias, const float* scales, void* y,
              const LinearShape& s, int threads) {
  LinearShape unpacked = s;
  unpacked.weight_stride = s.inputs + kLanes;  // rows of a power of two would share few sets of the cache
  const Job<float> job{Rows<float>(x, s), bias, nullptr, y, unpacked};
  parallel_share(blocks(s), s.rows * s.outputs * s.inputs, kLeastBlocks, threads,
                 [&](int64_t begin, int64_t end) {
                   std::vector<float> floats(kLanes * unpacked.weight_stride);
                   for (int64_t row = 0; row < s.rows; row += kRowsInCache)
                     for (int64_t block = begin; block < end; ++block) {
                       unpack(weight, scales, s, block, floats.data(), unpacked.weight_stride);
                       job.of_block(floats.data(), block, row, std::min(s.rows, row + kRowsInCache));
                     }
                 });
}

template <class W>
void run(const void* x, const void* weight, const void* bias, const float* scales, void* y,
         const LinearShape& s, int threads) {
  const auto of = s.rows <= kFewRows ? &read<W> : &multiply<W>;
  of(x, static_cast<const W*>(weight), bias, scales, y, s, threads);
}

}  // namespace

void linear_forward(const void* x, const void* weight, const void* bias, const float* scales, void* y,
                    const LinearShape& shape, int threads) {
  const auto of_type = shape.weight_dtype == DType::f32    ? &run<float>
                       : shape.weight_dtype == DType::bf16 ? &run<bf16>
                       : shape.weight_dtype == DType::f16  ? &run<f16>
                                                           : &run<int8_t>;
  of_type(x, weight, bias, scales, y, shape, threads);
}

}  // namespace lspm::cpu
