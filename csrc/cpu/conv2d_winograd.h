// Winograd's F(2x2, 3x3) for correlations of stride 1 with a 3x3 window: 16 products where the definition has
// 36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
//   Y = A' [sum over c of (G g G') (B' d B)] A
//
// A tile d of 4x4 pixels gives 2x2 of the output. The transformed tiles of a block lie in the second-level
// cache, [place][tile][channel], and each of the 16 places is a product of matrices with a panel of
// transformed filters. Sums are of as many products as there are channels, a ninth of the definition's, which
// makes up for what the transforms round. But a tile's infinity would reach all of its outputs, and so would
// an overflow: where a sum is not finite, the caller computes everything by the definition.
#pragma once
#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_tiles.h"

namespace lspm::cpu {

template <class T>
class Winograd {
 public:
  static bool admits(const Correlation& c) {
    if (!std::is_same_v<OperandOf<T>, float> || c.stride_h != 1 || c.stride_w != 1 || c.taps.size() != 9)
      return false;
    // Fewer do not fill a panel, or cost more to transform than they spare; with more, a panel of
    // transformed filters fills the second-level cache by itself.
    if (c.depth < 32 || c.depth > kMostChannels || c.filters < 32) return false;
    const auto [top, left] = corner(c);
    for (const Tap& tap : c.taps)
      if (tap.row > top + 2 || tap.column > left + 2) return false;
    return true;
  }

  explicit Winograd(const Correlation& correlation)
      : c(correlation), packing_(c), zeros_(c.depth), pitch_((round_up(c.depth, 16) / 16 | 1) * 16) {
    std::tie(top_, left_) = corner(c);
    std::fill_n(zeros_.get(), c.depth, T{});
    tile_rows_ = (c.rows + 1) / 2, tile_columns_ = (c.columns + 1) / 2;
    tiles_ = c.batch * tile_rows_ * tile_columns_;
    const int64_t fits = kBytes / int64_t(sizeof(float)) / (kPlaces * pitch_) / kTileRows * kTileRows;
    per_block_ = std::min<int64_t>(std::max<int64_t>(kTileRows, fits), tiles_);
  }

  int64_t blocks() const { return (tiles_ + per_block_ - 1) / per_block_; }
  int64_t panels() const { return packing_.panels(); }
  int64_t panel() const { return kPlaces * c.depth * kPanel; }
  int64_t room() const { return kPlaces * per_block_ * pitch_ + kPlaces * products_pitch() + outputs(); }

  // A panel of filters, transformed: [place][channel][kPanel].
  void pack(const T* weight, int64_t filters, float* to) const {
    const Room<float> taps(packing_.panel());
    std::fill_n(taps.get(), packing_.panel(), 0.0f);
    pack_panel(packing_, weight, filters, taps.get());
    const float* from[9];
    for (int t = 0; t < 9; ++t)
      from[(c.taps[t].row - top_) * 3 + c.taps[t].column - left_] = taps.get() + t * c.depth * kPanel;
    for (int64_t i = 0; i < c.depth * kPanel; i += kLanes) {
      F rows[4][3], places[4];
      for (int s = 0; s < 3; ++s) {
        filter_transform(load(from[s] + i), load(from[3 + s] + i), load(from[6 + s] + i), places);
        for (int r = 0; r < 4; ++r) rows[r][s] = places[r];
      }
      for (int r = 0; r < 4; ++r) {
        filter_transform(rows[r][0], rows[r][1], rows[r][2], places);
        for (int s = 0; s < 4; ++s) store(to + (r * 4 + s) * c.depth * kPanel + i, places[s]);
      }
    }
  }

  // The tiles of a block, transformed.
  const float* operands(const T* x, int64_t group, int64_t block, float* room) const {
    float* to = room;
    x += group * c.depth;
    for (int64_t t = begin(block); t < end(block); ++t, to += pitch_) {
      const int64_t image = t / (tile_rows_ * tile_columns_), row = t / tile_columns_ % tile_rows_ * 2 + top_;
      const int64_t column = t % tile_columns_ * 2 + left_;
      const T* from[kPlaces];
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t s = 0; s < 4; ++s) {
          const bool inside = row + r >= 0 && row + r < c.height && column + s >= 0 && column + s < c.width;
          from[r * 4 + s] =
              inside ? x + ((image * c.height + row + r) * c.width + column + s) * c.channels : zeros_.get();
        }
      for_each_vector(c.depth, [&](int64_t d, auto lanes) {
        F v[4][4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s) v[r][s] = lanes.load(from[r * 4 + s] + d);
          tile_transform(v[r][0], v[r][1], v[r][2], v[r][3]);
        }
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          tile_transform(v[0][s], v[1][s], v[2][s], v[3][s]);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) lanes.store(to + (r * 4 + s) * per_block_ * pitch_ + d, v[r][s]);
        }
      });
    }
    return room;
  }

  // The output of a block for a panel of filters; whether all sums are finite.
  bool panel_of_block(const float* operands, float* room, const float* right, int64_t block, int64_t filter,
                      int64_t filters, const Epilogue<T>& epilogue, T* y, Moments<T>* moments) const {
    const int64_t count = end(block) - begin(block), splits = (count + kTileRows - 1) / kTileRows;
    float* products = room + kPlaces * per_block_ * pitch_;
    static const std::vector<int64_t> kOneRun{0};
    for (int64_t place = 0; place < kPlaces; ++place, right += c.depth * kPanel)
      for (int64_t s = 0; s < splits; ++s) {
        const int64_t from = count * s / splits, rows = count * (s + 1) / splits - from;
        multiply_runs<false>(operands + (place * per_block_ + from) * pitch_, pitch_, kOneRun, c.depth, right,
                             products + place * products_pitch() + from * kPanel, rows, filters, false);
      }
    F zero_if_finite{};
    float* outputs = products + kPlaces * products_pitch();
    for (int64_t t = begin(block); t < end(block);) {  // tiles side by side in a row of them
      const int64_t row = t / tile_columns_, column = t % tile_columns_;
      const int64_t here = std::min(tile_columns_ - column, end(block) - t);
      for (int64_t i = 0; i < here; ++i)
        for (int64_t v = 0; v < filters; v += kLanes)
          zero_if_finite +=
              output_tile(products + (t - begin(block) + i) * kPanel + v, outputs + 2 * i * kPanel + v);
      const int64_t pixels = std::min(2 * here, c.columns - 2 * column);
      for (int64_t r = 0; r < 2 && row % tile_rows_ * 2 + r < c.rows; ++r) {
        float* sums = outputs + r * 2 * per_block_ * kPanel;
        epilogue.write(sums, pixels, filters, filter, y,
                       c.out_offset + row / tile_rows_ * c.out_image +
                           (row % tile_rows_ * 2 + r) * c.out_row + 2 * column * c.out_pixel + filter,
                       c.out_pixel);
        if (moments) moments->add(sums, pixels, filters);
      }
      t += here;
    }
    return sum(zero_if_finite) == 0.0f;
  }

  const Correlation& c;

 private:
  static constexpr int64_t kPlaces = 16, kBytes = 384 << 10, kMostChannels = 256;

  static std::pair<int64_t, int64_t> corner(const Correlation& c) {
    std::pair<int64_t, int64_t> least{c.taps[0].row, c.taps[0].column};
    for (const Tap& tap : c.taps)
      least = {std::min(least.first, tap.row), std::min(least.second, tap.column)};
    return least;
  }

  // A line more: places of a power of two of bytes apart would share a set of the cache.
  int64_t products_pitch() const { return per_block_ * kPanel + 16; }
  int64_t outputs() const { return 2 * 2 * per_block_ * kPanel; }
  int64_t begin(int64_t block) const { return tiles_ * block / blocks(); }
  int64_t end(int64_t block) const { return tiles_ * (block + 1) / blocks(); }

  static void filter_transform(F a, F b, F d, F (&to)[4]) {  // G
    const F outer = (a + d) * 0.5f, inner = b * 0.5f;
    to[0] = a, to[1] = outer + inner, to[2] = outer - inner, to[3] = d;
  }
  static void tile_transform(F& a, F& b, F& d, F& e) {  // B'
    const F sum = b + d, difference = d - b;
    a -= d, e = b - e, b = sum, d = difference;
  }

  // Two pixels of two rows; 0 in all lanes if those are finite.
  F output_tile(const float* products, float* to) const {
    F rows[2][4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const auto at = [&](int r) { return load(products + (r * 4 + s) * products_pitch()); };
      const F inner = at(1) + at(2);
      rows[0][s] = at(0) + inner;
      rows[1][s] = at(1) - at(2) - at(3);
    }
    F zeros{};
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const F first = rows[r][0] + (rows[r][1] + rows[r][2]), second = rows[r][1] - rows[r][2] - rows[r][3];
      store(to + r * 2 * per_block_ * kPanel, first);
      store(to + r * 2 * per_block_ * kPanel + kPanel, second);
      zeros += first * 0.0f + second * 0.0f;
    }
    return zeros;
  }

  Window<float> packing_;  // of the weights as they are
  Room<T> zeros_;
  int64_t pitch_;  // from tile to tile
  int64_t top_ = 0, left_ = 0, tile_rows_ = 0, tile_columns_ = 0, tiles_ = 0, per_block_ = 0;
};

}  // namespace lspm::cpu
