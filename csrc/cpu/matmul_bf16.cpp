// Products of bfloat16 matrices on AMX tiles; see matmul.cpp for those of float32.
//
// Who is free takes a block of c: as many columns as lie packed in the second-level cache over kDepth of
// depth. Rows of a that are contiguous are read where they lie. Sums go on in memory, as float32, and are
// rounded once, into c. How their products are split does not depend on blocks, so neither do they on the
// number of threads.
#include <memory>
#include <stdexcept>

#include "cpu/gemm_bf16.h"
#include "cpu/matmul_packing.h"
#include "cpu/parallel.h"

namespace lspm::cpu {

#if defined(__AMX_BF16__)
namespace {

constexpr int64_t kDepth = 4096, kTile = 32;
constexpr int64_t kPacked = 128 * kDepth;       // elements of b
constexpr int64_t kRows = 512, kColumns = 512;  // of a block of c at most
constexpr int64_t kInCache = 256;               // of depth: kTile rows and a panel in the first-level cache

struct Scratch {
  alignas(64) bf16 right[kPacked];
  bf16 left[kTile * (kDepth + kTile)];  // kTile rows; a stride that is no power of two
  float sums[kRows * kColumns];
};

template <class C>
struct Product {
  const MatrixView<bf16>&a, &b;
  const float* bias;
  const MatrixView<C>& c;
  bool accumulate;
  // Depth is taken in equal parts, and columns in equal blocks.
  int64_t parts = shares(a.cols, kDepth), part = share(a.cols, parts, kTile);
  int64_t blocks = shares(c.cols, std::min(kColumns, kPacked / part / kPanel * kPanel));
  int64_t width = share(c.cols, blocks, kPanel);

  static int64_t shares(int64_t n, int64_t most) { return std::max<int64_t>(1, (n + most - 1) / most); }
  static int64_t share(int64_t n, int64_t shares, int64_t unit) {
    return std::max(unit, round_up((n + shares - 1) / shares, unit));
  }

  // Rows of a, and the stride between them, so that whole tiles can be read.
  std::pair<const bf16*, int64_t> left(int64_t r, int64_t rows, int64_t d, int64_t depth, Scratch& w) const {
    constexpr int64_t kLeftStride = kDepth + kTile;
    if (is_transposed(a)) {
      pack_left_transposed(a.data + d * a.col_stride + r, a.col_stride, w.left, kLeftStride, rows, depth);
    } else {
      const bf16* const from = a.data + r * a.row_stride + d;
      if (rows == kTile && depth % kTile == 0) return {from, a.row_stride};
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(from + i * a.row_stride, depth, w.left + i * kLeftStride);
        std::fill_n(w.left + i * kLeftStride + depth, round_up(depth, kTile) - depth, bf16{});
      }
    }
    return {w.left, kLeftStride};
  }

  void put(int64_t r, int64_t rows, int64_t n, int64_t columns, const float* sums) const {
    for (int64_t i = 0; i < rows; ++i, sums += kColumns) {
      C* const to = c.data + (r + i) * c.row_stride + n;
      for_each_vector(columns, [&](int64_t j, auto lanes) {
        F sum = lanes.load(sums + j);
        if (bias) sum += lanes.load(bias + n + j);
        if (accumulate) sum += lanes.load(to + j);
        lanes.store(to + j, sum);
      });
    }
  }

  void block(int64_t first_row, int64_t last_row, int64_t n, int64_t columns, Scratch& w) const {
    constexpr int64_t kNoRuns[] = {0};
    for (int64_t d = 0; d == 0 || d < a.cols; d += part) {
      const int64_t depth = std::min(part, a.cols - d), panel = panel_size(depth);
      const bool last = d + part >= a.cols;
      pack_right(b, d, depth, n, columns, w.right);
      for (int64_t r = first_row; r < last_row; r += kTile) {
        const int64_t rows = std::min(kTile, last_row - r);
        const auto [from, stride] = left(r, rows, d, depth, w);
        float* const sums = w.sums + (parts > 1 ? (r - first_row) * kColumns : 0);
        for (int64_t k = 0; k == 0 || k < depth; k += kInCache)
          for (int64_t j = 0; j < columns; j += kPanel)
            tile_block(from + k, stride, kNoRuns, 1, std::min(kInCache, depth - k),
                       w.right + j / kPanel * panel + k * kPanel, sums + j, kColumns, rows, d + k > 0);
        if (last) put(r, rows, n, columns, sums);
      }
    }
  }
};

template <class C>
void multiply_matrices(const MatrixView<bf16>& a, const MatrixView<bf16>& b, const float* bias,
                       const MatrixView<C>& c, bool accumulate, int threads) {
  const Product<C> product{a, b, bias, c, accumulate};
  const int64_t across = product.blocks, items = (c.rows + kRows - 1) / kRows * across;
  parallel_claim(items, c.rows * c.cols * std::max<int64_t>(1, a.cols), threads, [&](auto next, int) {
    const TileRegisters tiles;
    const std::unique_ptr<Scratch> scratch(new Scratch);
    for (int64_t item; (item = next()) < items;) {
      const int64_t r = item / across * kRows, n = item % across * product.width;
      product.block(r, std::min(r + kRows, c.rows), n, std::min(product.width, c.cols - n), *scratch);
    }
  });
}

}  // namespace

template <class C>
void matmul_bf16(const MatrixView<bf16>& a, const MatrixView<bf16>& b, const float* bias,
                 const MatrixView<C>& c, bool accumulate, int threads) {
  multiply_matrices(a, b, bias, c, accumulate, threads);
}

#else

template <class C>
void matmul_bf16(const MatrixView<bf16>&, const MatrixView<bf16>&, const float*, const MatrixView<C>&, bool,
                 int) {
  throw std::invalid_argument("matmul: a must be float32 where there is no AMX, got bfloat16");
}

#endif

template void matmul_bf16(const MatrixView<bf16>&, const MatrixView<bf16>&, const float*,
                          const MatrixView<bf16>&, bool, int);
template void matmul_bf16(const MatrixView<bf16>&, const MatrixView<bf16>&, const float*,
                          const MatrixView<float>&, bool, int);

}  // namespace lspm::cpu
