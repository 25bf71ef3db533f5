// Products of matrices as in Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008:
// a block of b is packed into panels that stay in the second-level cache, and blocks of a's rows pass by it.
// A thread owns a part of c's longer side and packs for itself what it needs. The sums of a row of tiles, or
// of a panel, do not depend on where a part begins, so neither do they on the number of threads.
#include "matmul.h"

#include <memory>

#include "cpu/gemm.h"
#include "cpu/matmul_packing.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kRows = 8 * kTileRows;   // of a at a time
constexpr int64_t kColumns = 16 * kPanel;  // of b

struct Scratch {
  alignas(64) float left[kMaxDepth * kStride<float>];  // kRows rows, or, transposed, kMaxDepth of depth
  alignas(64) float right[kColumns / kPanel * panel_size(kMaxDepth)];
};

struct Product {
  const MatrixView<float>&a, &b, &c;
  const float* bias;
  bool accumulate;

  void pack_a(int64_t r, int64_t rows, int64_t d, int64_t depth, float* left) const {
    if (is_transposed(a))
      pack_left(a.data + d * a.col_stride + r, a.col_stride, 1.0f, left, depth, rows);
    else
      pack_left(a.data + r * a.row_stride + d, a.row_stride, 1.0f, left, rows, depth);
  }

  // The kernel writes columns up to the next multiple of kLanes: of the last ones, to a tile of their own.
  void block(const Scratch& w, int64_t r, int64_t rows, int64_t n, int64_t columns, int64_t depth,
             bool add) const {
    const auto multiply = is_transposed(a) ? &multiply_tiles<true, float> : &multiply_tiles<false, float>;
    const int64_t panel = panel_size(depth), whole = columns / kPanel * kPanel, rest = columns - whole;
    float* const to = c.data + r * c.row_stride + n;
    if (whole) multiply(w.left, w.right, panel, to, c.row_stride, rows, whole, depth, add);
    if (!rest) return;
    float tile[kRows * kPanel];
    multiply(w.left, w.right + whole / kPanel * panel, panel, tile, kPanel, rows, rest, depth, false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < rest; ++j) {
        float& sum = to[i * c.row_stride + whole + j];
        sum = add ? sum + tile[i * kPanel + j] : tile[i * kPanel + j];
      }
  }

  void begin(int64_t r, int64_t rows, int64_t n, int64_t columns) const {
    for (int64_t i = r; i < r + rows; ++i) std::copy_n(bias + n, columns, c.data + i * c.row_stride + n);
  }

  void part(int64_t first_row, int64_t last_row, int64_t first, int64_t last, Scratch& w) const {
    for (int64_t n = first; n < last; n += kColumns) {
      const int64_t columns = std::min(kColumns, last - n);
      for (int64_t d = 0; d < a.cols; d += kMaxDepth) {
        const int64_t depth = std::min(kMaxDepth, a.cols - d);
        pack_right(b, d, depth, n, columns, w.right);
        for (int64_t r = first_row, rows; r < last_row; r += rows) {
          rows = std::min(kRows, last_row - r);
          if (rows > kTileRows) rows -= rows % kTileRows;  // whole tiles, and then the last one
          pack_a(r, rows, d, depth, w.left);
          if (bias && d == 0) begin(r, rows, n, columns);
          block(w, r, rows, n, columns, depth, accumulate || bias || d > 0);
        }
      }
    }
  }
};

}  // namespace

void matmul(const MatrixView<float>& a, const MatrixView<float>& b, const float* bias,
            const MatrixView<float>& c, bool accumulate, int threads) {
  const Product product{a, b, c, bias, accumulate};
  if (a.cols == 0 && !accumulate)
    for (int64_t r = 0; r < c.rows; ++r)
      bias ? std::copy_n(bias, c.cols, c.data + r * c.row_stride)
           : std::fill_n(c.data + r * c.row_stride, c.cols, 0.0f);
  const bool by_rows = c.rows > c.cols;
  const int64_t unit = by_rows ? kTileRows : kPanel, length = by_rows ? c.rows : c.cols;
  parallel_for((length + unit - 1) / unit, c.rows * c.cols * a.cols, threads,
               [&](int64_t begin, int64_t end) {
                 const std::unique_ptr<Scratch> scratch(new Scratch);
                 const int64_t first = begin * unit, last = std::min(end * unit, length);
                 if (by_rows)
                   product.part(first, last, 0, c.cols, *scratch);
                 else
                   product.part(0, c.rows, first, last, *scratch);
               });
}

}  // namespace lspm::cpu
