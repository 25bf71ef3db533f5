// A model of the AMX instructions that the kernels use, for processors that have none: what each does to
// memory and to the eight tile registers, by Intel's description of it. Included before a source that is
// compiled as for AMX.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace amx_model {

struct Tile {
  int rows = 0, row_bytes = 0;  // 0: not configured
  uint8_t data[16][64];
};
inline thread_local Tile tiles[8];

inline Tile& configured(int tile) {
  if (tiles[tile].rows == 0) {
    std::fprintf(stderr, "AMX model: tile %d is used without a configuration\n", tile);
    std::abort();  // the instruction faults
  }
  return tiles[tile];
}

inline void load_config(const void* memory) {
  const auto* bytes = static_cast<const uint8_t*>(memory);
  for (int t = 0; t < 8; ++t) {
    tiles[t].rows = bytes[48 + t];
    std::memcpy(&tiles[t].row_bytes, bytes + 16 + 2 * t, 2);
    std::memset(tiles[t].data, 0, sizeof tiles[t].data);
  }
}

inline void load(int tile, const void* memory, int64_t stride) {
  Tile& t = configured(tile);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const char*>(memory) + r * stride, t.row_bytes);
}

inline void store(int tile, void* memory, int64_t stride) {
  const Tile& t = configured(tile);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<char*>(memory) + r * stride, t.data[r], t.row_bytes);
}

inline float from_bf16(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const uint32_t bits =
      (half & 0x7f80) ? uint32_t(half) << 16 : uint32_t(half & 0x8000) << 16;  // subnormal: 0
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// c[m][n] += the products of pairs a[m][2 k .. 2 k + 1] and b[k][2 n .. 2 n + 1], over k.
inline void dot_products(int c, int a, int b) {
  Tile &out = configured(c), &left = configured(a), &right = configured(b);
  for (int m = 0; m < out.rows; ++m)
    for (int k = 0; k < left.row_bytes / 4; ++k)
      for (int n = 0; n < out.row_bytes / 4; ++n) {
        float sum;
        std::memcpy(&sum, out.data[m] + 4 * n, sizeof sum);
        for (int i = 0; i < 2; ++i)
          sum = __builtin_fmaf(from_bf16(left.data[m] + 4 * k + 2 * i),
                               from_bf16(right.data[k] + 4 * n + 2 * i), sum);
        std::memcpy(out.data[m] + 4 * n, &sum, sizeof sum);
      }
}

}  // namespace amx_model

#define _tile_loadconfig(memory) amx_model::load_config(memory)
#define _tile_release() (void)(amx_model::tiles[0].rows = 0)
#define _tile_loadd(tile, memory, stride) amx_model::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) amx_model::store(tile, memory, stride)
#define _tile_zero(tile) std::memset(amx_model::configured(tile).data, 0, 1024)
#define _tile_dpbf16ps(c, a, b) amx_model::dot_products(c, a, b)
