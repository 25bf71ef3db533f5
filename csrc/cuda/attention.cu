// Attention with online softmax (Dao, "FlashAttention-2", 2023): forward.
//
// A block owns a tile of queries of one head, a warp 16 or 32 rows of it. Their maxima, denominators and sums
// of values stay in registers, in the layout of mma's accumulators, which is that of its left factor too, so
// probabilities never leave them. Tiles of keys and of values alternate in two buffers of shared memory: one
// is copied while the other is multiplied. Tiles that the window hides whole are skipped.
// Bytes moved: q and out once, k and v once for each tile of queries, from L2 where a head's fit.
#include "../attention.h"
#include "attention_tiles.cuh"

namespace lspm::cuda {
namespace {

// 32 rows to a warp halve what is read from shared memory for a product; what scores take beside the window
// needs the registers. Four warps of 255 registers: two blocks to a multiprocessor.
template <int kPadded, bool kHasExtras>
struct ForwardTile {
  static constexpr int kDim = kPadded;
  static constexpr bool kGeneral = kHasExtras;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = kGeneral || kDim > 128 ? 1 : 2;  // times 16
  static constexpr int kQueries = kWarps * kRows * 16;
  static constexpr int kKeys = kDim > 128 ? 32 : kDim == 128 && !kGeneral ? 48 : 64;
  static constexpr bool kHoldsQueries = kDim == 64;  // in registers
  static constexpr int kHeld = kHoldsQueries ? kDim / 16 : 1;
  static constexpr int kElements = (kQueries + 2 * kKeys) * kDim;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_forward_kernel(const __grid_constant__ ForwardCall call) {
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys, kTiles = kKeys / 8;
  constexpr bool kGeneral = Tile::kGeneral;
  DYNAMIC_SHARED(memory);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const k_tile = q_tile + Tile::kQueries * kDim;
  T* const v_tile = k_tile + kKeys * kDim;

  const int batch = blockIdx.z, head = blockIdx.y, kv_head = head / int(call.shape.group());
  const AttentionShape shape = call.shape.of(batch);
  const Window window(shape);
  // The last tile first: it has most to do where attention is causal.
  const int first = int(gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  if (first >= window.queries) return;
  const int last = min(first + Tile::kQueries, window.queries) - 1;
  const int begin = window.first_key(first) / kKeys * kKeys, end = window.end_key(last);
  const int open_begin = window.first_key(last), open_end = window.end_key(first);  // what all of them see
  const Rows<T> q(call.q, batch, head, window.queries, shape.head_dim);
  const Rows<T> k(call.k, batch, kv_head, window.keys, shape.head_dim);
  const Rows<T> v(call.v, batch, kv_head, window.keys, shape.value_dim);
  const auto load_keys = [&](int start) {
    load_tile<kGeneral, kDim, kKeys, Tile::kThreads>(k_tile, k, start, call.aligned);
    ptx::cp_async_commit();
  };
  const auto load_values = [&](int start) {
    load_tile<kGeneral, kDim, kKeys, Tile::kThreads>(v_tile, v, start, call.aligned);
    ptx::cp_async_commit();
  };

  if (begin < end) {
    load_tile<kGeneral, kDim, Tile::kQueries, Tile::kThreads>(q_tile, q, first, call.aligned);
    load_keys(begin);
  }
  const Share<16, 8> share = {int(threadIdx.x / kWarp) * 16 * kRows};
  const int place = lane_place<kDim>(true);
  uint32_t held[Tile::kHeld][kRows][4];
  if (Tile::kHoldsQueries && begin < end) {
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) load_rows<kDim>(held[i], q_tile, share, place, i);
  }

  float maximum[kRows][2], total[kRows][2] = {}, sums[kRows][kDim / 8][4] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) maximum[r][0] = maximum[r][1] = -INFINITY;
  for (int start = begin; start < end; start += kKeys) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the keys have come, and every warp is done with the values before
    load_values(start);
    float s[kRows][kTiles][4];
    multiply_transpose<kDim>(s, k_tile, [&](uint32_t (&a)[kRows][4], int i) {
      if constexpr (Tile::kHoldsQueries) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) a[r][j] = held[i][r][j];
      } else {
        load_rows<kDim>(a, q_tile, share, place, i);
      }
    });
    ptx::cp_async_wait<0>();
    __syncthreads();  // the values have come, and every warp is done with the keys
    if (start + kKeys < end) load_keys(start + kKeys);

    const auto query = [&](int r, int i) { return first + share.row(r, i / 2) + lane_row(); };
    const auto key = [&](int n, int i) { return start + 8 * n + lane_column() + i % 2; };
    if constexpr (kGeneral) {
      const Scores scores(call, window, shape, batch, head);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          float cap_slope[4];
          scores.apply(
              s[r][n], cap_slope, [&](int i) { return query(r, i); }, [&](int i) { return key(n, i); });
        }
    }
    if (start < open_begin || start + kKeys > open_end) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (window.hides(query(r, i), key(n, i))) s[r][n][i] = -INFINITY;
    }

    online_softmax(s, maximum, total, sums, call.exponent);
    if (kGeneral && call.drops) {
      uint32_t kept[kRows];
      draw_kept<kRows, kTiles>(kept, call, batch, head, first, start, share);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!(kept[r] >> (4 * n + i) & 1)) s[r][n][i] = 0.0f;
    }
    uint32_t p[kRows][kTiles / 2][4];
    as_factor<T>(p, s);
    multiply_add<kDim>(sums, p, v_tile);
  }

  float factor[kRows][2];
  const float* const sinks = call.extras.sinks;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = first + share.row(r, h) + lane_row();
      const float seen = quad_sum(total[r][h]);
      const bool hides = call.extras.mask.data || call.extras.bias.data;
      const bool sees = window.first_key(query) < window.end_key(query) && !(hides && seen == 0.0f);
      const float sink = sinks ? sinks[head] : -INFINITY;
      float common = base_of(maximum[r][h]) * call.unit;
      if (sinks) common = sees ? fmaxf(common, sink) : sink;
      const float power = common * kLog2e;  // as the backward finds it
      const float part = sees ? rebase(maximum[r][h], call.exponent, power) : 0.0f;
      float all = sees ? seen * part : 0.0f;
      if (sinks) all += ptx::ex2(fmaf(sink, kLog2e, -power));
      const float inverse = __fdividef(1.0f, all);
      factor[r][h] = sees ? part * inverse * call.kept : 0.0f;
      if (query < window.queries && lane_column() == 0) {
        const int64_t at = call.shape.row(batch, head, query);
        call.lse[at] = all == 0.0f ? -INFINITY : fmaf(power, kLn2, logf(all));
        call.statistics[at] = all == 0.0f ? 0.0f : common;
        call.statistics[call.shape.rows() + at] = all == 0.0f ? 0.0f : inverse;
      }
    }
  const Rows<T> out(call.out, batch, head, window.queries, shape.value_dim);
  store_rows<kDim>(sums, factor, q_tile, share, out, first, call.aligned);
}

}  // namespace

void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                       const AttentionExtras& extras, const HeadsView& out, float* lse, float* statistics,
                       float* scratch, int64_t splits, const AttentionShape& shape, int device,
                       void* stream) {
  if (shape.rows() == 0) return;
  const bool divided = scratch && decodes(shape, extras);
  const ForwardCall call = {
      attention_call(shape, extras, {&q, &k, &v, &out}, divided), q, k, v, out, lse, statistics};
  const DeviceGuard guard(device);
  if (divided) return attention_decode(call, scratch, int(splits), cudaStream_t(stream));
  with_type("attention_forward", shape.dtype, [&](auto type) {
    using T = decltype(type);
    with_tile<ForwardTile>(call, [&](auto tile) {
      using Tile = decltype(tile);
      const int64_t tiles = (shape.queries + Tile::kQueries - 1) / Tile::kQueries;
      launch({dim3(unsigned(tiles), unsigned(shape.heads), unsigned(shape.batch)), Tile::kThreads,
              Tile::kElements * sizeof(T), cudaStream_t(stream)},
             attention_forward_kernel<T, Tile>, call);
    });
  });
}

}  // namespace lspm::cuda
