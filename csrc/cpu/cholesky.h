// Sums of outer products and Cholesky's factorisation of small symmetric matrices, of whole vectors each way.
//
// Only the blocks on and above the diagonal are computed: the matrix is U'U. Both the sums and the
// factorisation, which goes from block row to block row and takes all earlier ones off at once, are the same
// register tile of kTileHeight rows by up to three vectors.
#pragma once
#include <cmath>

#include "cpu/csr_rows.h"

namespace lspm::cpu {

#if defined(__AVX512F__)
constexpr int kTileHeight = 8;
#else
constexpr int kTileHeight = 4;
#endif
constexpr int kTileWidth = 3;  // 24 of 32 registers hold sums, or 12 of 16

// to = from +- left right for a tile: element (r, d) of the left side is left[r * row + d * step], and rows
// of the right side lie right_step apart.
template <int kVectors, bool kSubtracts>
inline void product_tile(const float* left, int64_t row, int64_t step, const float* right, int64_t right_step,
                         int64_t depth, const float* from, float* to, int64_t stride) {
  F sums[kTileHeight][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d, left += step, right += right_step) {
    F across[kVectors];
    for (int v = 0; v < kVectors; ++v) across[v] = load(right + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileHeight; ++r) {
      const F down = broadcast(left[r * row]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] += down * across[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileHeight; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * stride + v * kLanes;
      const F before = from ? load(from + at) : F{};
      store(to + at, kSubtracts ? before - sums[r][v] : before + sums[r][v]);
    }
}

// The same for kTileHeight rows of any number of whole vectors of columns. from: null for zeros.
template <bool kSubtracts>
void product_rows(const float* left, int64_t row, int64_t step, const float* right, int64_t right_step,
                  int64_t depth, const float* from, float* to, int64_t stride, int64_t columns) {
  for (int64_t c = 0, vectors = columns / kLanes; vectors > 0;) {
    const int64_t width = vectors == kTileWidth + 1 ? 2 : vectors < kTileWidth ? vectors : kTileWidth;
    const auto tile = width == 3   ? &product_tile<3, kSubtracts>
                      : width == 2 ? &product_tile<2, kSubtracts>
                                   : &product_tile<1, kSubtracts>;
    tile(left, row, step, right + c, right_step, depth, from ? from + c : nullptr, to + c, stride);
    vectors -= width;
    c += width * kLanes;
  }
}

// to = from +- rows' rows, where `rows` (depth x columns) lie rows_stride apart: from column `begin` on, of
// the rows [begin, end) of the matrix. begin is a multiple of kLanes.
template <bool kSubtracts>
void add_outer_products(const float* rows, int64_t rows_stride, int64_t depth, const float* from, float* to,
                        int64_t stride, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t r = begin; r < end; r += kTileHeight) {
    const int64_t c = r / kLanes * kLanes, at = r * stride + c;
    product_rows<kSubtracts>(rows + r, 1, rows_stride, rows + c, rows_stride, depth,
                             from ? from + at : nullptr, to + at, stride, columns - c);
  }
}

// U in place of the blocks on and above a's diagonal, and 1 / U's diagonal. False where the matrix is not
// positive definite to a float's precision: rounding alone leaves of a pivot that ought to be 0 about the
// square root of n units in the last place of the element it began as.
inline bool factorise(float* a, int64_t stride, int64_t n, float* inverse) {
  const float least = 2.0f * std::sqrt(float(n)) * 1.1920929e-7f;
  for (int64_t i = 0; i < n; ++i) inverse[i] = a[i * stride + i] * least;
  for (int64_t b = 0; b < n; b += kLanes) {
    add_outer_products<true>(a, stride, b, a, a, stride, b, b + kLanes, n);
    float* const block = a + b * stride;
    F rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = load(block + r * stride + b);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      const float pivot = rows[r][r];
      if (!(pivot > inverse[b + r]) || !std::isfinite(pivot)) return false;
      inverse[b + r] = 1.0f / std::sqrt(pivot);
      rows[r] = first_lanes(F{}, r, rows[r] * inverse[b + r]);  // with zeros below the diagonal
      store(block + r * stride + b, rows[r]);
#pragma GCC unroll 16
      for (int s = 0; s < kLanes; ++s)
        if (s > r) rows[s] -= broadcast(block[r * stride + b + s]) * rows[r];
    }
    for (int64_t c = b + kLanes; c < n; c += kLanes) {
      for (int r = 0; r < kLanes; ++r) rows[r] = load(block + r * stride + c);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        rows[r] *= inverse[b + r];
#pragma GCC unroll 16
        for (int s = 0; s < kLanes; ++s)
          if (s > r) rows[s] -= broadcast(block[r * stride + b + s]) * rows[r];
        store(block + r * stride + c, rows[r]);
      }
    }
  }
  return true;
}

// x in place of b in U'U x = b.
inline void solve(const float* u, int64_t stride, int64_t n, const float* inverse, float* x) {
  for (int64_t b = 0; b < n; b += kLanes) {  // U'z = b
    const float* const block = u + b * stride;
    F rest = load(x + b);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      x[b + r] = rest[r] * inverse[b + r];
      rest -= load(block + r * stride + b) * x[b + r];
    }
    for (int64_t c = b + kLanes; c < n; c += kLanes) {
      F later = load(x + c);
      for (int r = 0; r < kLanes; ++r) later -= load(block + r * stride + c) * x[b + r];
      store(x + c, later);
    }
  }
  for (int64_t b = n - kLanes; b >= 0; b -= kLanes) {  // U x = z
    const float* rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = u + (b + r) * stride + b;
    F solved = {}, known = {};
    if (const int64_t after = n - b - kLanes; after > 0) {
      for (const float*& row : rows) row += kLanes;
      known = dots(rows, x + b + kLanes, after);
      for (const float*& row : rows) row -= kLanes;
    }
    const F rest = load(x + b) - known;
#pragma GCC unroll 16
    for (int r = kLanes - 1; r >= 0; --r)
      solved[r] = (rest[r] - sum(load(rows[r]) * solved)) * inverse[b + r];
    store(x + b, solved);
  }
}

}  // namespace lspm::cpu
