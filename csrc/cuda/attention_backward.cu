// The gradients of attention (Dao, "FlashAttention-2", 2023), without atomics: every sum has one owner.
//
// After each row's dot product of dout and out, a block owns a tile of keys and goes through the queries of
// all heads that read it (dk, dv), or a tile of queries and goes through the keys (dq, delta), which are
// copied ahead into two stages of shared memory. Sums stay in registers, and so do probabilities: where keys
// are owned, the products are transposed, so that they too are left factors of the next ones. Bytes moved:
// all tensors once, what is gone through once for each tile, from L2 where a head's fit.
#include "../attention.h"
#include "attention_tiles.cuh"

namespace lspm::cuda {
namespace {

struct BackwardCall : AttentionCall {
  HeadsView dout, q, k, v, out, dq, dk, dv;
  const float *dlse, *statistics;
  float *delta, *dots;
};

// Sizes without spills, and two blocks to a multiprocessor of sm_80 up to 128 dims.
template <int kPadded, bool kHasExtras>
struct QueriesTile {
  static constexpr int kDim = kPadded;
  static constexpr bool kGeneral = kHasExtras;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = kDim == 64 && !kGeneral ? 2 : 1;  // times 16, of queries to a warp
  static constexpr int kQueries = kWarps * kRows * 16, kKeys = kDim == 64 && kGeneral ? 64 : 32;
  static constexpr int kElements = 2 * kQueries * kDim + 4 * kKeys * kDim;
};
template <int kPadded, bool kHasExtras>
struct KeysTile {
  static constexpr int kDim = kPadded;
  static constexpr bool kGeneral = kHasExtras;
  // Of 256 dims a warp sums up 128, in half of the 255 registers of a thread, and two share their keys.
  static constexpr int kKeyWarps = 4, kSplit = kDim > 128 ? 2 : 1, kThreads = kKeyWarps * kSplit * kWarp;
  static constexpr int kRows = kDim == 64 && !kGeneral ? 2 : 1;  // times 16, of keys to a warp
  static constexpr int kKeys = kKeyWarps * kRows * 16, kQueries = 32;
  static constexpr int kElements = 2 * kKeys * kDim + 4 * kQueries * kDim;
  static constexpr int kStatistics = 2 * 3 * kQueries;  // floats
};

constexpr int kLanesOfRow = 8;
constexpr int kDotThreads = 128;

template <class T>
__global__ void __launch_bounds__(kDotThreads)
    attention_dots_kernel(const __grid_constant__ BackwardCall call) {
  const int batch = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % kLanesOfRow;
  const int query = int(blockIdx.x * (kDotThreads / kLanesOfRow) + threadIdx.x / kLanesOfRow);
  const AttentionShape shape = call.shape.of(batch);
  const bool inside = query < shape.queries;  // lanes of other rows still take part in the sums
  float sum = 0.0f;
  if (inside) {
    const T* const dout = call.dout.at<T>(batch, head, query);
    const T* const out = call.out.at<T>(batch, head, query);
    if (call.aligned) {
      for (int col = lane * kChunk; col < shape.value_dim; col += kLanesOfRow * kChunk) {
        const Vec<T, kChunk> a = load<kChunk>(dout + col), b = load<kChunk>(out + col);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) sum += to_float(a.at[e]) * to_float(b.at[e]);
      }
    } else {
      for (int col = lane; col < shape.value_dim; col += kLanesOfRow)
        sum += to_float(dout[col]) * to_float(out[col]);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kLanesOfRow; distance *= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (!inside || lane != 0) return;
  const int64_t at = call.shape.row(batch, head, query);
  call.dots[at] = call.dlse ? sum - call.dlse[at] : sum;
}

// What the backward knows of a row of the softmax.
struct RowStatistics {
  float power, share, dot;  // p = 2^(score - power) share

  __device__ static RowStatistics of(const BackwardCall& call, int64_t row) {
    return {call.statistics[row] * kLog2e, call.statistics[call.shape.rows() + row], call.dots[row]};
  }
};

// Turns a fragment's products s and gradients dp of the dropped probabilities into the gradients of the
// products over the scale; and s into the probabilities as dropout leaves them or, kSums, those times their
// gradients. kept: bit i says whether dropout keeps element i.
template <bool kGeneral, bool kSums, class Query, class Key, class Statistics>
__device__ __forceinline__ void differentiate(float (&s)[4], float (&dp)[4], uint32_t kept,
                                              const Scores& scores, bool masked, Query query, Key key,
                                              Statistics statistics) {
  const AttentionCall& call = scores.call;
  float cap_slope[4];
  if constexpr (kGeneral) {
    scores.apply(s, cap_slope, query, key);
    if (masked) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (scores.window.hides(query(i), key(i))) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const RowStatistics row = statistics(i);
    const float p = ptx::ex2(fmaf(s[i], call.exponent, -row.power)) * row.share;
    float dropped = p;
    if constexpr (kGeneral) {
      const float factor = kept >> i & 1 ? call.kept : 0.0f;
      dropped *= factor;
      dp[i] *= factor;
    }
    s[i] = kSums ? p * dp[i] : dropped;
    dp[i] = p * (dp[i] - row.dot);
    if constexpr (kGeneral) dp[i] *= cap_slope[i];
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 256 / Tile::kThreads)
    attention_dkdv_kernel(const __grid_constant__ BackwardCall call) {
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys, kQueries = Tile::kQueries;
  constexpr int kTiles = kQueries / 8, kSums = kDim / Tile::kSplit;
  constexpr bool kGeneral = Tile::kGeneral;
  DYNAMIC_SHARED(memory);
  T* const k_tile = reinterpret_cast<T*>(memory);
  T* const v_tile = k_tile + kKeys * kDim;
  T* const q_tiles = v_tile + kKeys * kDim;
  T* const dout_tiles = q_tiles + 2 * kQueries * kDim;
  float* const rows = reinterpret_cast<float*>(dout_tiles + 2 * kQueries * kDim);

  const int batch = blockIdx.z, kv_head = blockIdx.y, first = int(blockIdx.x) * kKeys;
  const int group = int(call.shape.group());
  const AttentionShape shape = call.shape.of(batch);
  const Window window(shape);
  if (first >= window.keys) return;
  const int last = min(first + kKeys, window.keys) - 1;
  const int begin = window.first_query(first) / kQueries * kQueries, end = window.end_query(last);
  const Rows<T> k(call.k, batch, kv_head, window.keys, shape.head_dim);
  const Rows<T> v(call.v, batch, kv_head, window.keys, shape.value_dim);
  Rows<T> q(call.q, batch, int64_t(kv_head) * group, window.queries, shape.head_dim);
  Rows<T> dout(call.dout, batch, int64_t(kv_head) * group, window.queries, shape.value_dim);
  int64_t row = call.shape.row(batch, int64_t(kv_head) * group, 0);  // of the head's first query
  const int64_t head_rows = call.shape.query_starts ? call.shape.packed : call.shape.queries;
  const auto load_queries = [&](int stage, int start) {
    load_tile<kGeneral, kDim, kQueries, Tile::kThreads>(q_tiles + stage * kQueries * kDim, q, start,
                                                        call.aligned);
    load_tile<kGeneral, kDim, kQueries, Tile::kThreads>(dout_tiles + stage * kQueries * kDim, dout, start,
                                                        call.aligned);
    ptx::cp_async_commit();
  };
  const auto load_row = [&](int start) {
    const int query = start + int(threadIdx.x);
    return threadIdx.x < kQueries && query < window.queries ? RowStatistics::of(call, row + query)
                                                            : RowStatistics{0.0f, 0.0f, 0.0f};
  };
  const auto store_row = [&](int stage, const RowStatistics& of) {
    if (threadIdx.x >= kQueries) return;
    float* const at = rows + stage * 3 * kQueries + threadIdx.x;
    at[0] = of.power, at[kQueries] = of.share, at[2 * kQueries] = of.dot;
  };

  const int warp = threadIdx.x / kWarp, key_warp = warp % Tile::kKeyWarps;
  // Rows 16 apart share dropout's counters.
  const Share<32, 16> share = {32 * kRows * (key_warp / 2) + 8 * (key_warp % 2)};
  const int column = warp / Tile::kKeyWarps * kSums;
  const int place = lane_place<kDim>(true, 16);
  float dk_sums[kRows][kSums / 8][4] = {}, dv_sums[kRows][kSums / 8][4] = {};
  if (begin < end) {
    load_tile<kGeneral, kDim, kKeys, Tile::kThreads>(k_tile, k, first, call.aligned);
    load_tile<kGeneral, kDim, kKeys, Tile::kThreads>(v_tile, v, first, call.aligned);
    load_queries(0, begin);
    store_row(0, load_row(begin));
  }
  const int tiles = begin < end ? (end - begin + kQueries - 1) / kQueries : 0;
  int start = begin, head = kv_head * group;
  for (int step = 0; step < tiles * group; ++step) {
    const int stage = step % 2, this_start = start, this_head = head;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has come, and every warp is done with the other
    const bool more = step + 1 < tiles * group;
    RowStatistics next = {};
    if (more) {
      start += kQueries;
      if (start >= end) {
        start = begin, ++head, row += head_rows;
        q.data += call.q.head_stride, dout.data += call.dout.head_stride;
      }
      load_queries(1 - stage, start);
      next = load_row(start);
    }
    const T* const q_tile = q_tiles + stage * kQueries * kDim;
    const T* const dout_tile = dout_tiles + stage * kQueries * kDim;
    const float* const of_rows = rows + stage * 3 * kQueries;
    float s[kRows][kTiles][4], dp[kRows][kTiles][4];
    multiply_transpose<kDim>(
        s, q_tile, [&](uint32_t (&a)[kRows][4], int i) { load_rows<kDim>(a, k_tile, share, place, i); });
    multiply_transpose<kDim>(
        dp, dout_tile, [&](uint32_t (&a)[kRows][4], int i) { load_rows<kDim>(a, v_tile, share, place, i); });

    const auto key = [&](int r, int i) { return first + share.row(r, i / 2) + lane_row(); };
    const auto query = [&](int n, int i) { return this_start + 8 * n + lane_column() + i % 2; };
    const bool masked = first < window.first_key(min(this_start + kQueries, window.queries) - 1) ||
                        first + kKeys > window.end_key(this_start);
    uint32_t kept[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) kept[r] = ~0u;
    if (kGeneral && call.drops)
      draw_kept_transposed<kRows, kTiles>(kept, call, batch, this_head, this_start, first, share);
    if (!kGeneral && masked) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (window.hides(query(n, i), key(r, i))) s[r][n][i] = -INFINITY;
    }
    const Scores scores(call, window, shape, batch, this_head);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float* const at = of_rows + 8 * n + lane_column();
      const Vec<float, 2> power = load<2>(at), part = load<2>(at + kQueries),
                          dot = load<2>(at + 2 * kQueries);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        differentiate<kGeneral, false>(
            s[r][n], dp[r][n], kept[r] >> 4 * n, scores, masked, [&](int i) { return query(n, i); },
            [&](int i) { return key(r, i); },
            [&](int i) { return RowStatistics{power.at[i % 2], part.at[i % 2], dot.at[i % 2]}; });
    }
    uint32_t p[kRows][kTiles / 2][4], ds[kRows][kTiles / 2][4];
    as_factor<T>(p, s);
    as_factor<T>(ds, dp);
    multiply_add<kDim>(dv_sums, p, dout_tile + column);
    multiply_add<kDim>(dk_sums, ds, q_tile + column);
    if (more) store_row(1 - stage, next);
  }

  __syncthreads();  // every warp is done with the keys and values
  float one[kRows][2], scale[kRows][2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    one[r][0] = one[r][1] = 1.0f;
    scale[r][0] = scale[r][1] = call.shape.scale;
  }
  const Rows<T> dk(call.dk, batch, kv_head, window.keys, shape.head_dim);
  const Rows<T> dv(call.dv, batch, kv_head, window.keys, shape.value_dim);
  store_rows<kDim>(dk_sums, scale, k_tile, share, dk, first, call.aligned, column);
  store_rows<kDim>(dv_sums, one, v_tile, share, dv, first, call.aligned, column);
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_dq_kernel(const __grid_constant__ BackwardCall call) {
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys, kTiles = kKeys / 8;
  constexpr bool kGeneral = Tile::kGeneral;
  DYNAMIC_SHARED(memory);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const dout_tile = q_tile + Tile::kQueries * kDim;
  T* const k_tiles = dout_tile + Tile::kQueries * kDim;
  T* const v_tiles = k_tiles + 2 * kKeys * kDim;

  const int batch = blockIdx.z, head = blockIdx.y, kv_head = head / int(call.shape.group());
  const AttentionShape shape = call.shape.of(batch);
  const Window window(shape);
  const int first = int(gridDim.x - 1 - blockIdx.x) * Tile::kQueries;  // the tile with most to do first
  if (first >= window.queries) return;
  const int last = min(first + Tile::kQueries, window.queries) - 1;
  const int begin = window.first_key(first) / kKeys * kKeys, end = window.end_key(last);
  const int open_begin = window.first_key(last), open_end = window.end_key(first);  // what all of them see
  const Rows<T> k(call.k, batch, kv_head, window.keys, shape.head_dim);
  const Rows<T> v(call.v, batch, kv_head, window.keys, shape.value_dim);
  const auto load_keys = [&](int stage, int start) {
    load_tile<kGeneral, kDim, kKeys, Tile::kThreads>(k_tiles + stage * kKeys * kDim, k, start, call.aligned);
    load_tile<kGeneral, kDim, kKeys, Tile::kThreads>(v_tiles + stage * kKeys * kDim, v, start, call.aligned);
    ptx::cp_async_commit();
  };
  if (begin < end) {
    const Rows<T> q(call.q, batch, head, window.queries, shape.head_dim);
    const Rows<T> dout(call.dout, batch, head, window.queries, shape.value_dim);
    load_tile<kGeneral, kDim, Tile::kQueries, Tile::kThreads>(q_tile, q, first, call.aligned);
    load_tile<kGeneral, kDim, Tile::kQueries, Tile::kThreads>(dout_tile, dout, first, call.aligned);
    load_keys(0, begin);
  }

  const Share<16, 8> share = {int(threadIdx.x / kWarp) * 16 * kRows};
  const int place = lane_place<kDim>(true);
  const auto query = [&](int r, int i) { return first + share.row(r, i / 2) + lane_row(); };
  RowStatistics rows[kRows][2] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (query(r, 2 * h) < window.queries)
        rows[r][h] = RowStatistics::of(call, call.shape.row(batch, head, query(r, 2 * h)));
  const Scores scores(call, window, shape, batch, head);
  float dq_sums[kRows][kDim / 8][4] = {}, total[kRows][2] = {};
  int stage = 0;
  for (int start = begin; start < end; start += kKeys, stage = 1 - stage) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has come, and every warp is done with the other
    if (start + kKeys < end) load_keys(1 - stage, start + kKeys);
    const T* const k_tile = k_tiles + stage * kKeys * kDim;
    const T* const v_tile = v_tiles + stage * kKeys * kDim;
    float s[kRows][kTiles][4], dp[kRows][kTiles][4];
    multiply_transpose<kDim>(
        s, k_tile, [&](uint32_t (&a)[kRows][4], int i) { load_rows<kDim>(a, q_tile, share, place, i); });
    multiply_transpose<kDim>(
        dp, v_tile, [&](uint32_t (&a)[kRows][4], int i) { load_rows<kDim>(a, dout_tile, share, place, i); });

    const auto key = [&](int n, int i) { return start + 8 * n + lane_column() + i % 2; };
    const bool masked = start < open_begin || start + kKeys > open_end;
    uint32_t kept[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) kept[r] = ~0u;
    if (kGeneral && call.drops) draw_kept<kRows, kTiles>(kept, call, batch, head, first, start, share);
    if (!kGeneral && masked) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (window.hides(query(r, i), key(n, i))) s[r][n][i] = -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        differentiate<kGeneral, true>(
            s[r][n], dp[r][n], kept[r] >> 4 * n, scores, masked, [&](int i) { return query(r, i); },
            [&](int i) { return key(n, i); }, [&](int i) { return rows[r][i / 2]; });
        if constexpr (kGeneral) {
#pragma unroll
          for (int i = 0; i < 4; ++i) total[r][i / 2] += s[r][n][i];
        }
      }
    uint32_t ds[kRows][kTiles / 2][4];
    as_factor<T>(ds, dp);
    multiply_add<kDim>(dq_sums, ds, k_tile);
  }

  float scale[kRows][2];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[r][h] = call.shape.scale;
      // Without a sink nobody needs it more exact than the dot product is, which knows out as it was rounded.
      float delta = rows[r][h].dot;
      if constexpr (kGeneral) delta = quad_sum(total[r][h]);
      if (query(r, 2 * h) >= window.queries || lane_column() != 0) continue;
      const int64_t at = call.shape.row(batch, head, query(r, 2 * h));
      if (kGeneral && call.dlse) delta -= call.dlse[at];
      call.delta[at] = delta;
    }
  const Rows<T> dq(call.dq, batch, head, window.queries, shape.head_dim);
  store_rows<kDim>(dq_sums, scale, q_tile, share, dq, first, call.aligned);
}

unsigned tiles_of(int64_t rows, int tile) { return unsigned((rows + tile - 1) / tile); }

}  // namespace

void attention_backward(const HeadsView& dout, const float* dlse, const HeadsView& q, const HeadsView& k,
                        const HeadsView& v, const AttentionExtras& extras, const HeadsView& out,
                        const float* statistics, const HeadsView& dq, const HeadsView& dk,
                        const HeadsView& dv, float* delta, const AttentionShape& shape, int device,
                        void* stream) {
  const AttentionShape& s = shape;
  const unsigned heads = unsigned(s.heads), kv_heads = unsigned(s.kv_heads), batch = unsigned(s.batch);
  if (batch == 0 || heads == 0) return;
  BackwardCall call = {attention_call(s, extras, {&dout, &q, &k, &v, &out, &dq, &dk, &dv}, extras.sinks),
                       dout,
                       q,
                       k,
                       v,
                       out,
                       dq,
                       dk,
                       dv,
                       dlse,
                       statistics,
                       delta,
                       delta + s.rows()};
  const DeviceGuard guard(device);
  const auto at = [&](dim3 grid, int threads, size_t bytes) {
    return LaunchConfig(grid, unsigned(threads), bytes, cudaStream_t(stream));
  };
  with_type("attention_backward", s.dtype, [&](auto type) {
    using T = decltype(type);
    if (s.queries > 0)
      launch(at(dim3(tiles_of(s.queries, kDotThreads / kLanesOfRow), heads, batch), kDotThreads, 0),
             attention_dots_kernel<T>, call);
    with_tile<KeysTile>(call, [&](auto tile) {
      using Tile = decltype(tile);
      if (s.keys > 0)
        launch(at(dim3(tiles_of(s.keys, Tile::kKeys), kv_heads, batch), Tile::kThreads,
                  Tile::kElements * sizeof(T) + Tile::kStatistics * sizeof(float)),
               attention_dkdv_kernel<T, Tile>, call);
    });
    with_tile<QueriesTile>(call, [&](auto tile) {
      using Tile = decltype(tile);
      if (s.queries > 0)
        launch(at(dim3(tiles_of(s.queries, Tile::kQueries), heads, batch), Tile::kThreads,
                  Tile::kElements * sizeof(T)),
               attention_dq_kernel<T, Tile>, call);
    });
  });
}

}  // namespace lspm::cuda
