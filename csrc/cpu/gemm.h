// Products of small matrices that lie packed in a kernel's scratch memory: C = A B or C += A B, C in float.
//
// A, the left side, is row-major with rows of kStride elements and is read one element at a time; it serves
// as its own transpose. B, the right side, lies in panels of kPanel columns, so that the inner loop reads it
// in order: [columns / kPanel][depth][kPanel]. A register tile of kTileRows x kPanel of C stays in registers
// over the whole depth: 28 of AVX-512's 32 registers, 12 of the 16 that AVX2 and SSE have.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "cpu/transpose.h"

namespace lspm::cpu {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
constexpr int64_t kPanel = kTileVectors * kLanes;

constexpr int64_t kMaxDepth = 256;
// Products in one sum; several such sums make a longer one, since rounding errors grow with a sum's length.
// The additions to memory that this takes cost the less, the narrower the vectors are: 16, 64, or all
// products.
constexpr int64_t kSumDepth = std::min<int64_t>(kMaxDepth, kLanes* kLanes);
// Elements from row to row of a left side. One cache line more than a power of two: rows would otherwise
// share few sets of the cache.
template <class Operand>
constexpr int64_t kStride = kMaxDepth + 64 / sizeof(Operand);

// What the depth of a product is filled up to with zeros.
template <class Operand>
constexpr int64_t kTileDepth = 1;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Elements of a panel of a right side. 32 is as much as any packing below fills up.
constexpr int64_t panel_size(int64_t depth) { return round_up(depth, 32) * kPanel; }

// Where rows r and r + 1 (r even) of column n begin in a right side.
template <class Operand>
Operand* right_at(Operand* right, int64_t panel, int64_t r, int64_t n) {
  return right + n / kPanel * panel + r * kPanel + n % kPanel * (sizeof(float) / sizeof(Operand));
}
inline void store_right(float* right, F even, F odd) {
  store(right, even);
  store(right + kPanel, odd);
}
inline void store_left(float* left, F v) { store(left, v); }

// How one step in depth is taken: with floats it is one multiply-add.
template <class Operand>
struct Step {
  static constexpr int64_t kDepth = 1;
  static F load_left(const Operand* p) { return broadcast(*p); }
  static F load_last(const Operand* p) { return load_left(p); }
  static F add_product(F sum, F a, const Operand* b) { return sum + a * load(b); }
};

template <bool kTransposed, int kRows, int kVectors, class Operand, bool kInOrder>
void register_tile(const Operand* left, const Operand* right, int64_t depth, float* c, int64_t c_stride,
                   bool accumulate) {
  using One = Step<Operand>;
  constexpr int64_t kRow = kTransposed ? 1 : kStride<Operand>, kAhead = kTransposed ? kStride<Operand> : 1;
  // A small tile would wait for each sum before the next; the registers it leaves free hold more sums, each
  // of every second or fourth product. In order, a sum does not depend on the size of its tile.
  constexpr int kSums = kInOrder ? 1 : kTileRows * kTileVectors / (kRows * kVectors);
  constexpr int kSplit = kSums >= 4 ? 4 : kSums >= 2 ? 2 : 1;
  F sums[kSplit][kRows][kVectors] = {};
  const auto add_products = [&](auto& sum) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F a = One::load_left(left + r * kRow);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = One::add_product(sum[r][v], a, right + v * kLanes * One::kDepth);
    }
    left += kAhead * One::kDepth;
    right += kPanel * One::kDepth;
  };
  int64_t d = 0;
  for (; d + kSplit * One::kDepth <= depth; d += kSplit * One::kDepth)
#pragma GCC unroll 4
    for (int i = 0; i < kSplit; ++i) add_products(sums[i]);
  for (; d < depth; d += One::kDepth) add_products(sums[0]);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      F sum = sums[0][r][v];
      for (int i = 1; i < kSplit; ++i) sum += sums[i][r][v];
      float* to = c + r * c_stride + v * kLanes;
      store(to, accumulate ? load(to) + sum : sum);
    }
}

template <class Operand>
using RegisterTile = void (*)(const Operand*, const Operand*, int64_t, float*, int64_t, bool);

template <bool kTransposed, int kVectors, class Operand, bool kInOrder, int... kRows>
constexpr std::array<RegisterTile<Operand>, sizeof...(kRows)> register_tiles(
    std::integer_sequence<int, kRows...>) {
  return {register_tile<kTransposed, kRows + 1, kVectors, Operand, kInOrder>...};
}

template <bool kTransposed, class Operand, bool kInOrder = false>
void multiply_tiles(const Operand* left, const Operand* right, int64_t panel, float* c, int64_t c_stride,
                    int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  constexpr auto kRows = std::make_integer_sequence<int, kTileRows>();
  constexpr auto kHalf = register_tiles<kTransposed, 1, Operand, kInOrder>(kRows),
                 kWhole = register_tiles<kTransposed, 2, Operand, kInOrder>(kRows);
  // In order a sum has no parts beside it, which would make it shorter.
  constexpr int64_t kRun = kInOrder ? std::min<int64_t>(kSumDepth, 64) : kSumDepth;
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < columns; n += kPanel, right += panel, c += kPanel) {
    const auto& tiles = columns - n > kLanes ? kWhole : kHalf;
    int64_t row = 0;
    for (int64_t b = 0; b < blocks; ++b) {  // blocks of rows that differ by one at most
      const int64_t next = rows * (b + 1) / blocks;
      const Operand* a = left + row * (kTransposed ? 1 : kStride<Operand>);
      int64_t d = 0;
      do {
        tiles[next - row - 1](a + d * (kTransposed ? kStride<Operand> : 1), right + d * kPanel,
                              std::min(kRun, depth - d), c + row * c_stride, c_stride, accumulate || d > 0);
      } while ((d += kRun) < depth);
      row = next;
    }
  }
}

// C (rows x columns) = A B, or C += A B. `panel` is the number of elements from one panel of B to the next.
// Columns of C are written up to the next multiple of kLanes.
inline void multiply(const float* left, const float* right, int64_t panel, float* c, int64_t c_stride,
                     int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  multiply_tiles<false>(left, right, panel, c, c_stride, rows, columns, depth, accumulate);
}

// The same, every element summed in the same order, whatever number of rows and columns is beside it.
inline void multiply_in_order(const float* left, const float* right, int64_t panel, float* c,
                              int64_t c_stride, int64_t rows, int64_t columns, int64_t depth,
                              bool accumulate) {
  multiply_tiles<false, float, true>(left, right, panel, c, c_stride, rows, columns, depth, accumulate);
}

// The same of a left side that is A's transpose, (depth x rows). The workspace is a left side of `rows` rows.
inline void multiply_transposed(const float* left, float* /*workspace*/, const float* right, int64_t panel,
                                float* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t depth,
                                bool accumulate) {
  multiply_tiles<true>(left, right, panel, c, c_stride, rows, columns, depth, accumulate);
}

// A as it lies in a tensor, times `scale`, copied to a left side.
template <class T>
void pack_left(const T* from, int64_t from_stride, float scale, float* left, int64_t rows, int64_t depth) {
  for (int64_t r = 0; r < rows; ++r)
    for_each_vector(depth, [&](int64_t d, auto lanes) {
      store(left + r * kStride<float> + d, lanes.load(from + r * from_stride + d) * scale);
    });
}

// B as it lies in a tensor, (depth x columns), copied to panels; columns are filled up with zeros.
template <class T>
void pack_right(const T* from, int64_t from_stride, float* right, int64_t panel, int64_t depth,
                int64_t columns) {
  for (int64_t n = 0; n < columns; n += kPanel, right += panel)
    for (int64_t d = 0; d < depth; ++d) {
      const T* row = from + d * from_stride + n;
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t left = columns - n - v * kLanes;
        float* to = right + d * kPanel + v * kLanes;
        store(to, left >= kLanes ? load(row + v * kLanes)
                  : left > 0     ? FirstLanes{int(left)}.load(row + v * kLanes)
                                 : F{});
      }
    }
}

// The same of B's transpose, (columns x depth) in the tensor. Panels have room for `depth` rounded up to
// kLanes.
template <class T>
void pack_right_transposed(const T* from, int64_t from_stride, float* right, int64_t panel, int64_t depth,
                           int64_t columns) {
  for (int64_t n = 0; n < round_up(columns, kPanel); n += kLanes) {
    float* to = right + n / kPanel * panel + n % kPanel;
    for_each_vector(depth, [&](int64_t d, auto lanes) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = n + i < columns ? lanes.load(from + (n + i) * from_stride + d) : F{};
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kPanel, block[i]);
    });
  }
}

}  // namespace lspm::cpu
