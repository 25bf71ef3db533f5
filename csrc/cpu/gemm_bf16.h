// The products of gemm.h with bfloat16 operands, summed in float: on AMX tiles, or by AVX-512's dot products
// of pairs. Other builds have neither and take bfloat16 as float.
//
// A left side is as in gemm.h, its rows and depth filled with zeros to multiples of kTileDepth. A right side
// has two consecutive depths of a column side by side, as both instructions take them: [columns / kPanel]
// [depth / 2][kPanel][2]. A tile register holds 16 rows of 64 bytes, and a block of 16 x 32 of C is two
// tiles over one of A and two of B: five registers. A block of 32 x 32, which takes all eight, is up to a
// tenth faster where a thread has its core for itself, and takes 1.4 times as long where it has half of it.
// The instructions take subnormal numbers for zero; so may then what is rounded for them here.
#pragma once
#include <type_traits>

#include "cpu/gemm.h"

namespace lspm::cpu {

#if defined(__AMX_BF16__)
// The tile registers, configured as long as it lives, for the thread that made it.
struct TileRegisters {
  TileRegisters() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
  }
  ~TileRegisters() { _tile_release(); }
};
#else
struct TileRegisters {
  TileRegisters() {}
};
#endif

#if !defined(__AVX512BF16__)

template <class T>
using OperandOf = float;

#else

template <class T>
using OperandOf = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;

template <>
constexpr int64_t kTileDepth<bf16> = 32;

inline void store_left(bf16* left, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(left), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

inline void store_right(bf16* right, F even, F odd) {
  const U pairs = to_pairs(even, odd);
  std::memcpy(right, &pairs, sizeof pairs);
}

inline void pack_left(const bf16* from, int64_t from_stride, float, bf16* left, int64_t rows, int64_t depth) {
  const int64_t filled = round_up(depth, kTileDepth<bf16>), last = round_up(rows, kTileDepth<bf16>);
  for (int64_t r = 0; r < last; ++r, left += kStride<bf16>) {
    const int64_t here = r < rows ? depth : 0;
    if (here) std::memcpy(left, from + r * from_stride, here * sizeof(bf16));
    std::memset(left + here, 0, (filled - here) * sizeof(bf16));
  }
}

// Columns [n, n + kLanes) of row d of a matrix as the high halves of floats, zeros beyond its ends.
inline U row_part(const bf16* from, int64_t from_stride, int64_t d, int64_t depth, int64_t n,
                  int64_t columns) {
  const int64_t here = d < depth ? std::min<int64_t>(columns - n, kLanes) : 0;
  const bf16* at = from + d * from_stride + n;
  return reinterpret_cast<U>(here == kLanes ? load(at) : here > 0 ? FirstLanes{int(here)}.load(at) : F{});
}
inline U row_pairs(const bf16* from, int64_t from_stride, int64_t d, int64_t depth, int64_t n,
                   int64_t columns) {
  return row_part(from, from_stride, d, depth, n, columns) >> 16 |
         row_part(from, from_stride, d + 1, depth, n, columns);
}

inline void pack_right(const bf16* from, int64_t from_stride, bf16* right, int64_t panel, int64_t depth,
                       int64_t columns) {
  for (int64_t n = 0; n < round_up(columns, kPanel); n += kLanes)
    for (int64_t d = 0; d < round_up(depth, kTileDepth<bf16>); d += 2) {
      const U pairs = row_pairs(from, from_stride, d, depth, n, columns);
      std::memcpy(right + n / kPanel * panel + d * kPanel + n % kPanel * 2, &pairs, sizeof pairs);
    }
}

// A left side of which `from` has the transpose: depth by rows.
inline void pack_left_transposed(const bf16* from, int64_t from_stride, bf16* left, int64_t stride,
                                 int64_t rows, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 2 * kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = reinterpret_cast<F>(row_pairs(from, from_stride, d + 2 * i, depth, r, rows));
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(left + (r + i) * stride + d), block[i]);
    }
}

// Two neighbours in depth move as one 32-bit element.
inline void pack_right_transposed(const bf16* from, int64_t from_stride, bf16* right, int64_t panel,
                                  int64_t depth, int64_t columns) {
  for (int64_t n = 0; n < round_up(columns, kPanel); n += kLanes)
    for (int64_t d = 0; d < round_up(depth, kTileDepth<bf16>); d += 2 * kLanes) {
      F block[kLanes] = {};
      const int64_t here = std::clamp<int64_t>(depth - d, 0, 2 * kLanes);
      const bf16* const at = from + n * from_stride + d;
      if (here == 2 * kLanes && n + kLanes <= columns) {  // without a call for each row
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) std::memcpy(&block[i], at + i * from_stride, sizeof(F));
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, columns - n); ++i)
          std::memcpy(&block[i], at + i * from_stride, here * sizeof(bf16));
      }
      transpose(block);
      bf16* to = right + n / kPanel * panel + d * kPanel + n % kPanel * 2;
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + 2 * i * kPanel), block[i]);
    }
}

template <>
struct Step<bf16> {
  static constexpr int64_t kDepth = 2;
  static F load_left(const bf16* p) {
    float pair;
    std::memcpy(&pair, p, sizeof pair);
    return broadcast(pair);
  }
  // One alone, with a zero beside it.
  static F load_last(const bf16* p) {
    const uint32_t pair = p->bits;
    float bits;
    std::memcpy(&bits, &pair, sizeof bits);
    return broadcast(bits);
  }
  static F add_product(F sum, F a, const bf16* b) {
    U pairs;
    std::memcpy(&pairs, b, sizeof pairs);
    lspm::add_product(sum, reinterpret_cast<U>(a), pairs);
    return sum;
  }
};

#if defined(__AMX_BF16__)

// Rows, which lie `stride` apart and go on at each of `runs`, times a panel. Rows of C are written up to the
// next multiple of 16.
inline void tile_block(const bf16* left, int64_t stride, const int64_t* runs, int64_t count, int64_t depth,
                       const bf16* right, float* c, int64_t c_stride, int64_t rows, bool accumulate) {
  asm volatile("" ::: "memory");  // the compiler does not know that a tile load reads memory
  constexpr int64_t kRightBytes = 2 * kPanel * sizeof(bf16);
  const int64_t left_bytes = stride * sizeof(bf16), c_bytes = c_stride * sizeof(float);
  for (int64_t r = 0; r < rows; r += 16, left += 16 * stride, c += 16 * c_stride) {
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    const bf16* panel = right;
    for (int64_t run = 0; run < count; ++run) {
      const bf16* from = left + runs[run];
      for (int64_t d = 0; d < depth; d += kTileDepth<bf16>, panel += kTileDepth<bf16> * kPanel) {
        _tile_loadd(2, from + d, left_bytes);
        _tile_loadd(3, panel, kRightBytes);
        _tile_loadd(4, panel + kPanel, kRightBytes);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
  }
}

// Columns of C are written up to the next multiple of kPanel.
inline void multiply(const bf16* left, const bf16* right, int64_t panel, float* c, int64_t c_stride,
                     int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  constexpr int64_t kNoRuns[] = {0};
  for (int64_t n = 0; n < columns; n += kPanel, right += panel, c += kPanel)
    tile_block(left, kStride<bf16>, kNoRuns, 1, depth, right, c, c_stride, rows, accumulate);
}
inline void multiply_in_order(const bf16* left, const bf16* right, int64_t panel, float* c, int64_t c_stride,
                              int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  multiply(left, right, panel, c, c_stride, rows, columns, depth, accumulate);  // tiles are never split
}

#else

inline void multiply(const bf16* left, const bf16* right, int64_t panel, float* c, int64_t c_stride,
                     int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  multiply_tiles<false>(left, right, panel, c, c_stride, rows, columns, depth, accumulate);
}
inline void multiply_in_order(const bf16* left, const bf16* right, int64_t panel, float* c, int64_t c_stride,
                              int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  multiply_tiles<false, bf16, true>(left, right, panel, c, c_stride, rows, columns, depth, accumulate);
}

#endif

inline void multiply_transposed(const bf16* left, bf16* workspace, const bf16* right, int64_t panel, float* c,
                                int64_t c_stride, int64_t rows, int64_t columns, int64_t depth,
                                bool accumulate) {
  pack_left_transposed(left, kStride<bf16>, workspace, kStride<bf16>, rows, depth);
  multiply(workspace, right, panel, c, c_stride, rows, columns, depth, accumulate);
}

#endif

}  // namespace lspm::cpu
