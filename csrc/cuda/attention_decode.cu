// Attention of few queries to many keys (Dao et al., "Flash-Decoding", 2023), as where a cache is decoded.
//
// A block owns one part of the keys of one key head, and all queries of all heads that read it: at most 64
// rows of one tile, so that keys and values are read once. Reading them is all that takes time: while one
// tile of both is multiplied, the next is on its way. Its warps divide the rows or, where one warp has room
// for all, each tile's keys, and then join what they found. What is in registers is as in the forward; each
// part's maxima, denominators and sums go to scratch, and a warp for each row adds up the parts in an order
// that their number gives. Bytes moved: k and v once, and 4 (value_dim + 2) for each row and part, twice.
#include "../attention.h"
#include "attention_tiles.cuh"

namespace lspm::cuda {
namespace {

constexpr int kDecodeRows = 64;

template <int kPadded, int kMostRows>
struct Parts {
  static constexpr int kDim = kPadded, kRows = kMostRows, kKeys = kDim > 128 ? 32 : 64;
  static constexpr bool kKeysApart = kRows == 16;
  static constexpr int kOwnKeys = kKeysApart ? 16 : kKeys;  // of a tile: a warp's
  static constexpr int kWarps = kKeysApart ? kKeys / kOwnKeys : kRows / 16, kThreads = kWarps * kWarp;
  static constexpr int kStage = 2 * kKeys * kDim, kElements = kRows * kDim + 2 * kStage;
};
template <int kPadded, bool>
using ManyRows = Parts<kPadded, kDecodeRows>;
template <int kPadded, bool>
using FewRows = Parts<kPadded, 16>;

// The sums of a row's values in one part, their reference, the power of 2, and the denominator under it.
__device__ __forceinline__ float* part_of(float* scratch, const AttentionShape& shape, int part,
                                          int64_t row) {
  return scratch + (part * shape.rows() + row) * (shape.value_dim + 2);
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_decode_kernel(const __grid_constant__ ForwardCall call, float* scratch) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys, kTiles = Tile::kOwnKeys / 8, kChunks = kDim / kChunk;
  DYNAMIC_SHARED(memory);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const stages = q_tile + Tile::kRows * kDim;  // two, each of keys and of values

  const int part = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z, group = int(call.shape.group());
  const AttentionShape shape = call.shape.of(batch);
  const Window window(shape);
  const int rows = window.queries * group;
  const int first = window.first_key(0) / kKeys,
            end = (window.end_key(window.queries - 1) + kKeys - 1) / kKeys;
  const int tiles = max(end - first, 0), parts = int(gridDim.x);
  const int begin_key = (first + int(int64_t(tiles) * part / parts)) * kKeys;
  const int end_key = (first + int(int64_t(tiles) * (part + 1) / parts)) * kKeys;
  const Rows<T> k(call.k, batch, kv_head, window.keys, shape.head_dim);
  const Rows<T> v(call.v, batch, kv_head, window.keys, shape.value_dim);
  const auto row_of = [&](int row) {  // where scratch and statistics have it
    return call.shape.row(batch, int64_t(kv_head) * group + row % group, row / group);
  };
  const auto load_stage = [&](int stage, int start) {
    T* const to = stages + stage * Tile::kStage;
    load_tile<true, kDim, kKeys, Tile::kThreads, kDim <= 128>(to, k, start, call.aligned);
    load_tile<true, kDim, kKeys, Tile::kThreads, kDim <= 128>(to + kKeys * kDim, v, start, call.aligned);
    ptx::cp_async_commit();
  };

  if (begin_key < end_key) {
    for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += Tile::kThreads) {
      const int row = i / kChunks, col = i % kChunks * kChunk;
      const bool inside = row < rows;
      const T* const from =
          inside ? call.q.at<T>(batch, int64_t(kv_head) * group + row % group, row / group) : nullptr;
      Vec<T, kChunk> chunk;
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        chunk.at[e] = inside && col + e < shape.head_dim ? from[col + e] : from_float<T>(0.0f);
      store(q_tile + row * kDim + (col ^ row % 8 * kChunk), chunk);
    }
    load_stage(0, begin_key);
  }
  const int warp = threadIdx.x / kWarp, own_key = Tile::kKeysApart ? warp * Tile::kOwnKeys : 0;
  const Share<16, 8> share = {Tile::kKeysApart ? 0 : warp * 16};
  const bool works = share.first < rows;  // other warps only copy
  const int place = lane_place<kDim>(true);
  int query[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) query[h] = (share.row(0, h) + lane_row()) / group;
  float maximum[1][2] = {{-INFINITY, -INFINITY}}, total[1][2] = {}, sums[1][kDim / 8][4] = {};
  for (int start = begin_key, stage = 0; start < end_key; start += kKeys, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has come, and every warp is done with the other
    if (start + kKeys < end_key) load_stage(stage ^ 1, start + kKeys);
    if (!works) continue;
    const T* const k_tile = stages + stage * Tile::kStage + own_key * kDim;
    const T* const v_tile = k_tile + kKeys * kDim;
    float s[1][kTiles][4];
    multiply_transpose<kDim>(
        s, k_tile, [&](uint32_t (&a)[1][4], int i) { load_rows<kDim>(a, q_tile, share, place, i); });
    const Scores scores(call, window, shape, batch, kv_head);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float cap_slope[4];
      const auto key = [&](int i) { return start + own_key + 8 * n + lane_column() + i % 2; };
      scores.apply(s[0][n], cap_slope, [&](int i) { return query[i / 2]; }, key);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (window.hides(query[i / 2], key(i))) s[0][n][i] = -INFINITY;
    }
    online_softmax(s, maximum, total, sums, call.exponent);
    uint32_t p[1][kTiles / 2][4];
    as_factor<T>(p, s);
    multiply_add<kDim>(sums, p, v_tile);
  }
  float* const found = reinterpret_cast<float*>(stages);  // by each warp, where keys are apart
  if (Tile::kKeysApart) __syncthreads();                  // the last stage has been read
  if (works) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float seen = quad_sum(total[0][h]);
      const int row = share.row(0, h) + lane_row();
      if (row >= rows) continue;
      const float power = maximum[0][h] == -INFINITY ? -INFINITY : maximum[0][h] * call.unit * kLog2e;
      const float factor = maximum[0][h] == -INFINITY ? 1.0f : rebase(maximum[0][h], call.exponent, power);
      float* const to = Tile::kKeysApart ? found + (warp * Tile::kRows + row) * (shape.value_dim + 2)
                                         : part_of(scratch, call.shape, part, row_of(row));
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (const int col = 8 * n + lane_column() + e; col < shape.value_dim)
            to[col] = sums[0][n][2 * h + e] * factor;
      if (lane_column() == 0) {
        to[shape.value_dim] = power;
        to[shape.value_dim + 1] = seen * factor;
      }
    }
  }
  if (!Tile::kKeysApart) return;
  __syncthreads();
  const int dim = int(shape.value_dim), width = dim + 2, apart = Tile::kRows * width;
  for (int i = threadIdx.x; i < rows * width; i += Tile::kThreads) {
    const int row = i / width, col = i - row * width;
    const float* const from = found + row * width;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) largest = fmaxf(largest, from[w * apart + dim]);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w)
      sum += from[w * apart + col] * ptx::ex2(from[w * apart + dim] - base_of(largest));
    part_of(scratch, call.shape, part, row_of(row))[col] = col == dim ? largest : sum;
  }
}

constexpr int kCombineRows = 4;  // to a block

template <class T>
__global__ void __launch_bounds__(kCombineRows* kWarp)
    attention_combine_kernel(const __grid_constant__ ForwardCall call, float* scratch, int parts) {
  const int batch = blockIdx.z, head = blockIdx.y, lane = threadIdx.x;
  const int query = int(blockIdx.x * kCombineRows + threadIdx.y);
  const AttentionShape shape = call.shape.of(batch);
  const Window window(shape);
  if (query >= window.queries) return;
  const int64_t row = call.shape.row(batch, head, query);
  const int dim = int(shape.value_dim);
  const float* const found = part_of(scratch, call.shape, 0, row);
  const int64_t apart = call.shape.rows() * (dim + 2);  // of a row's parts
  float largest = -INFINITY;
  for (int part = lane; part < parts; part += kWarp) largest = fmaxf(largest, found[part * apart + dim]);
  largest = warp_max(largest);
  const float base = base_of(largest);
  float seen = 0.0f;
  for (int part = lane; part < parts; part += kWarp)
    seen += found[part * apart + dim + 1] * ptx::ex2(found[part * apart + dim] - base);
  seen = warp_sum(seen);

  const bool sees = window.first_key(query) < window.end_key(query);
  const float* const sinks = call.extras.sinks;
  const float sink = sinks ? sinks[head] : -INFINITY;
  float common = base * kLn2;
  if (sinks) common = sees ? fmaxf(common, sink) : sink;
  const float power = common * kLog2e;  // as the backward finds it
  const float share = sees ? rebase(base, 1.0f, power) : 0.0f;
  float all = sees ? seen * share : 0.0f;
  if (sinks) all += ptx::ex2(fmaf(sink, kLog2e, -power));
  const float inverse = __fdividef(1.0f, all), factor = share * inverse;
  T* const out = call.out.at<T>(batch, head, query);
  for (int first = 0; first < dim; first += kWarp) {
    const int col = first + lane;
    float sum = 0.0f;
    for (int begin = 0; begin < parts; begin += kWarp) {
      const float weight = begin + lane < parts ? ptx::ex2(found[(begin + lane) * apart + dim] - base) : 0.0f;
      const int count = min(parts - begin, kWarp);
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const float own = __shfl_sync(kAllLanes, weight, i);
        if (col < dim) sum += found[(begin + i) * apart + col] * own;
      }
    }
    if (col < dim) out[col] = from_float<T>(sees ? sum * factor : 0.0f);
  }
  if (lane != 0) return;
  call.lse[row] = all == 0.0f ? -INFINITY : fmaf(power, kLn2, logf(all));
  call.statistics[row] = all == 0.0f ? 0.0f : common;
  call.statistics[call.shape.rows() + row] = all == 0.0f ? 0.0f : inverse;
}

}  // namespace

bool decodes(const AttentionShape& shape, const AttentionExtras& extras) {
  return shape.queries * shape.group() <= kDecodeRows && !extras.bias.data && !extras.mask.data &&
         !extras.slopes.data && !(shape.dropout > 0.0);
}

void attention_decode(const ForwardCall& call, float* scratch, int splits, cudaStream_t stream) {
  const AttentionShape& s = call.shape;
  with_type("attention_forward", s.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto tile) {
      using Tile = decltype(tile);
      launch({dim3(unsigned(splits), unsigned(s.kv_heads), unsigned(s.batch)), Tile::kThreads,
              Tile::kElements * sizeof(T), stream},
             attention_decode_kernel<T, Tile>, call, scratch);
    };
    if (s.queries * s.group() <= FewRows<64, true>::kRows)
      with_tile<FewRows>(call, run);
    else
      with_tile<ManyRows>(call, run);
    const unsigned blocks = unsigned((s.queries + kCombineRows - 1) / kCombineRows);
    launch({dim3(blocks, unsigned(s.heads), unsigned(s.batch)), dim3(kWarp, kCombineRows), 0, stream},
           attention_combine_kernel<T>, call, scratch, splits);
  });
}

}  // namespace lspm::cuda
