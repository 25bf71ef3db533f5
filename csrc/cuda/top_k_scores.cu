// The items that score best for each query.
//
// A block owns 64 queries, or 16 where there are few or k is large, and walks the items in tiles of 64, which
// come by cp.async while the tile before is multiplied: by tensor cores for elements of 16 bits, else by FMA
// with the same lanes for the same scores. A score that may still be among a query's k best goes, with its
// item, into the query's room in shared memory; where that could overflow, a warp sorts it, the best k stay
// and the k-th becomes the threshold. What a query excludes lies sorted and is looked up by bisection, only
// then. Scores and items make keys of a total order, so the order in which they come changes nothing; for few
// queries blocks share out the items, and a second kernel joins what they found. Bytes: the items once for
// each block of queries, from the second-level cache where blocks run abreast; no score is written.
#include "../top_k_scores.h"
#include "attention_tiles.cuh"

namespace lspm::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kItems = 64;  // of a tile
// Of a row of a tile. A sum of as many products is added to those before it by an addition that rounds to
// nearest: tensor cores cut off what they add up, always towards zero, and over a long row that shows.
constexpr int kRowBytes = 128;
constexpr int kChunks = kRowBytes / kVectorBytes;
constexpr int kManyQueries = 64, kFewQueries = 16;
constexpr int kMostBest = 512;   // k: with 16 queries, rooms for twice as many keys take 128 KiB
constexpr int kLeastRoom = 128;  // keys

// A score and its item as one number, the better one the larger: scores in the high half, ordered as
// integers, and in the low half the complement of the index. 0 is no key.
using Key = unsigned long long;

__device__ __forceinline__ Key key_of(float score, int64_t item) {
  const uint32_t of_score = __float_as_uint(score + 0.0f);  // the two zeros are equal
  const uint32_t ordered = score != score ? ~0u : of_score >> 31 ? ~of_score : of_score | 0x80000000u;
  return Key(ordered) << 32 | uint32_t(~item);
}
__device__ __forceinline__ float score_of(Key key) {
  const uint32_t ordered = uint32_t(key >> 32);
  if (ordered == ~0u) return NAN;
  return __uint_as_float(ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered);
}

// Of a query: as many keys as the power of two that holds k and another tile's.
int room_for(int64_t k) {
  int room = kLeastRoom;
  while (room < k + kItems) room *= 2;
  return room;
}

// A query's keys in shared memory. All of a warp call what is not of one key.
struct Best {
  Key *keys, *threshold;  // [room]; the k-th best, once there are so many
  int *count, room, k;

  __device__ __forceinline__ void start(int lane) const {
    if (lane == 0) *threshold = 0, *count = 0;
  }
  __device__ __forceinline__ bool may_take(Key key) const { return key > *threshold; }
  __device__ __forceinline__ void take(Key key) const { keys[atomicAdd(count, 1)] = key; }
  __device__ __forceinline__ bool may_overflow() const { return *count > room - kItems; }

  // Keeps the best k, in order; behind them stand zeros where there are fewer.
  __device__ __forceinline__ void sort(int lane) const {
    const int before = *count;
    for (int n = before + lane; n < room; n += kWarp) keys[n] = 0;
    __syncwarp();
    for (int size = 2; size <= room; size *= 2)  // bitonic
      for (int apart = size / 2; apart > 0; apart /= 2) {
        for (int n = lane; n < room / 2; n += kWarp) {
          const int first = 2 * n - (n & (apart - 1));
          const Key a = keys[first], b = keys[first + apart];
          if ((a < b) == !(first & size)) keys[first] = b, keys[first + apart] = a;
        }
        __syncwarp();
      }
    if (lane == 0) {
      *count = before < k ? before : k;
      *threshold = keys[k - 1];
    }
    __syncwarp();
  }

  __device__ __forceinline__ void write(int64_t query, float* scores, int64_t* indices, int lane) const {
    for (int n = lane; n < k; n += kWarp) {
      const Key key = keys[n];
      scores[query * k + n] = key ? score_of(key) : -INFINITY;
      indices[query * k + n] = key ? int64_t(uint32_t(~key)) : -1;
    }
  }
};

struct Call {
  const void *queries, *items;
  const float* item_bias;
  Exclusions exclusions;  // each query's in order
  float* scores;
  int64_t* indices;
  Key* parts;  // (parts, queries, k), or null for one part
  TopKScoresShape shape;
  int room;
  bool aligned;  // rows, to 16 bytes, and dim a multiple of as much
};

// Starts to copy `rows` rows of a tile, from `first` on and of columns from `from` on; zeros behind the last.
template <class T>
__device__ __forceinline__ void load_tile(T* tile, const void* data, int64_t stride, int64_t first,
                                          int64_t end, int64_t from, int64_t dim, int rows, bool aligned) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const int chunk = threadIdx.x % kChunks;
  const int64_t column = from + chunk * kWide;
  for (int row = threadIdx.x / kChunks; row < rows; row += kThreads / kChunks) {
    T* const to = tile + row * kChunks * kWide + (chunk ^ row % kChunks) * kWide;
    const bool valid = first + row < end && column < dim;
    const T* const source = static_cast<const T*>(data) + (first + row) * stride + column;
    if (aligned) {
      ptx::cp_async16(to, valid ? source : static_cast<const T*>(data), valid);
    } else {
      Vec<T, kWide> vector;
#pragma unroll
      for (int e = 0; e < kWide; ++e)
        vector.at[e] = valid && column + e < dim ? source[e] : from_float<T>(0.0f);
      store(to, vector);
    }
  }
}

// d = the scores of 16 queries, from row `query` of a tile on, by 8 kTiles items from row `item` on.
template <int kTiles, class T>
__device__ __forceinline__ void multiply(float (&d)[1][kTiles][4], const T* queries, const T* items,
                                         int query, int item) {
  constexpr int kDim = kRowBytes / sizeof(T);
  if constexpr (sizeof(T) == 2) {
    const int place = lane_place<kDim>(true);
    multiply_transpose<kDim>(d, items + item * kDim, [&](uint32_t (&a)[1][4], int k) {
      load_rows<kDim>(a, queries, Share<16, 8>{query}, place, k);
    });
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[0][n][i] = 0.0f;
#pragma unroll 1  // unrolled, ptxas moves so many loads up that it spills
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const auto part = [&](const float* tile, int row) {
        return load<4>(tile + row * kDim + (chunk ^ row % kChunks) * 4);
      };
      Vec<float, 4> a[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) a[h] = part(queries, query + lane_row() + 8 * h);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Vec<float, 4> b = part(items, item + 8 * n + lane_column() + e);
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 4; ++i) d[0][n][2 * h + e] += a[h].at[i] * b.at[i];
        }
    }
  }
}

// Whether a query excludes an item. Lists that lie nowhere are not followed.
__device__ __forceinline__ bool excludes(const Exclusions& exclusions, int64_t query, int64_t item) {
  const int64_t end = min(exclusions.indptr[query + 1], exclusions.count);
  int64_t low = max(exclusions.indptr[query], int64_t(0)), high = end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (exclusions.indices[middle] < item)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && exclusions.indices[low] == item;
}

template <class T, int kQueries>
__global__ void __launch_bounds__(kThreads, kQueries == kManyQueries ? 2 : 1)
    top_k_scores_forward_kernel(const Call call) {
  constexpr int kDim = kRowBytes / sizeof(T);
  constexpr int kAcross = kWarps / (kQueries / 16);  // warps that have the same queries
  constexpr int kTiles = kItems / 8 / kAcross;
  DYNAMIC_SHARED(memory);
  T* const tiles = reinterpret_cast<T*>(memory);  // [2][kQueries + kItems][kDim]
  Key* const keys = reinterpret_cast<Key*>(tiles + 2 * (kQueries + kItems) * kDim);  // [kQueries][room]
  SHARED(Key, thresholds, [kQueries]);
  SHARED(int, counts, [kQueries]);
  const TopKScoresShape& s = call.shape;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, k = int(s.k);
  const int own_query = warp / kAcross * 16, own_item = warp % kAcross * 8 * kTiles;
  const int64_t query = int64_t(blockIdx.x) * kQueries;
  const auto best = [&](int row) {
    return Best{keys + row * call.room, thresholds + row, counts + row, call.room, k};
  };
  for (int row = warp; row < kQueries; row += kWarps) best(row).start(lane);

  // This part's tiles, each in `deep` pieces of kDim columns.
  const int64_t all = (s.items + kItems - 1) / kItems, first = all * blockIdx.y / gridDim.y;
  const int64_t end = all * (blockIdx.y + 1) / gridDim.y, deep = s.dim > kDim ? (s.dim + kDim - 1) / kDim : 1;
  const auto start_load = [&](int64_t tile, int64_t piece, int stage, bool queries) {
    T* const to = tiles + stage * (kQueries + kItems) * kDim;
    if (queries)
      load_tile(to, call.queries, s.query_stride, query, s.queries, piece * kDim, s.dim, kQueries,
                call.aligned);
    load_tile(to + kQueries * kDim, call.items, s.item_stride, tile * kItems, s.items, piece * kDim, s.dim,
              kItems, call.aligned);
    ptx::cp_async_commit();
  };
  if (first < end) start_load(first, 0, 0, true);
  int stage = 0;
  int64_t loaded = 1;
  float sums[kTiles][4];
  for (int64_t tile = first; tile < end; ++tile) {
    for (int64_t piece = 0; piece < deep; ++piece) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this piece is there, and the one before has been read
      const int64_t next = piece + 1 < deep ? tile : tile + 1;
      // Queries of a single piece stay where they are, once in each stage.
      if (next < end) start_load(next, piece + 1 < deep ? piece + 1 : 0, stage ^ 1, deep > 1 || loaded < 2);
      ++loaded;
      const T* const from = tiles + stage * (kQueries + kItems) * kDim;
      stage ^= 1;
      float part[1][kTiles][4];
      multiply(part, from, from + kQueries * kDim, own_query, own_item);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = piece ? sums[n][i] + part[0][n][i] : part[0][n][i];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = own_query + lane_row() + i / 2 * 8;
        const int64_t item = tile * kItems + own_item + 8 * n + lane_column() + i % 2;
        if (item >= s.items || query + row >= s.queries) continue;
        const float score = call.item_bias ? sums[n][i] + call.item_bias[item] : sums[n][i];
        const Key key = key_of(score, item);
        if (!best(row).may_take(key)) continue;
        if (call.exclusions.indptr && excludes(call.exclusions, query + row, item)) continue;
        best(row).take(key);
      }
    __syncthreads();  // all of the tile's keys are there
    for (int row = warp; row < kQueries; row += kWarps) {
      const bool sorts = best(row).may_overflow();
      __syncwarp();
      if (sorts) best(row).sort(lane);
    }
  }
  __syncthreads();
  for (int row = warp; row < kQueries && query + row < s.queries; row += kWarps) {
    const Best of_row = best(row);
    of_row.sort(lane);
    if (call.parts) {
      Key* const to = call.parts + (blockIdx.y * s.queries + query + row) * k;
      for (int n = lane; n < k; n += kWarp) to[n] = of_row.keys[n];
    } else {
      of_row.write(query + row, call.scores, call.indices, lane);
    }
  }
}

// A warp joins what the parts found for a query.
__global__ void __launch_bounds__(kWarp) top_k_scores_join_kernel(const Call call, int parts) {
  DYNAMIC_SHARED(memory);
  Key* const keys = reinterpret_cast<Key*>(memory);  // [room], a threshold, a count
  const int lane = threadIdx.x, k = int(call.shape.k);
  const int64_t query = blockIdx.x;
  Key* const threshold = keys + call.room;
  const Best best = {keys, threshold, reinterpret_cast<int*>(threshold + 1), call.room, k};
  best.start(lane);
  __syncwarp();
  for (int part = 0; part < parts; ++part) {
    const Key* const from = call.parts + (part * call.shape.queries + query) * k;
    for (int first = 0; first < k; first += kItems) {
#pragma unroll
      for (int n = 0; n < kItems; n += kWarp) {
        const Key key = first + n + lane < k ? from[first + n + lane] : 0;
        if (best.may_take(key)) best.take(key);  // which 0 is not
      }
      __syncwarp();
      const bool sorts = best.may_overflow();
      __syncwarp();
      if (sorts) best.sort(lane);
    }
  }
  best.sort(lane);
  best.write(query, call.scores, call.indices, lane);
}

}  // namespace

void top_k_scores_forward(const void* queries, const void* items, const float* item_bias,
                          const Exclusions& exclusions, int64_t* scratch, int64_t parts, float* scores,
                          int64_t* indices, const TopKScoresShape& s, int device, void* stream) {
  if (s.k > kMostBest)
    throw std::invalid_argument("top_k_scores_forward: k must be at most " + std::to_string(kMostBest) +
                                ", got " + std::to_string(s.k));
  const auto start = [&](auto type) {
    using T = decltype(type);
    if (s.queries == 0 || s.k == 0) return;
    constexpr int kWide = kVectorBytes / sizeof(T);
    const bool aligned =
        (s.dim | s.query_stride | s.item_stride) % kWide == 0 &&
        aligned_for_vectors(static_cast<const char*>(queries), static_cast<const char*>(items));
    const int room = room_for(s.k);
    const Call call = {queries,
                       items,
                       item_bias,
                       exclusions,
                       scores,
                       indices,
                       parts > 1 ? reinterpret_cast<Key*>(scratch) : nullptr,
                       s,
                       room,
                       aligned};
    const DeviceGuard guard(device);
    const auto on = cudaStream_t(stream);
    const auto run = [&](auto* kernel, int of_block) {
      const size_t bytes = 2 * (of_block + kItems) * kRowBytes + size_t(of_block) * room * sizeof(Key);
      launch({dim3(unsigned((s.queries + of_block - 1) / of_block), unsigned(parts)), kThreads, bytes, on},
             kernel, call);
    };
    if (s.queries > kFewQueries && room == kLeastRoom)
      run(top_k_scores_forward_kernel<T, kManyQueries>, kManyQueries);
    else
      run(top_k_scores_forward_kernel<T, kFewQueries>, kFewQueries);
    if (parts > 1)
      launch({unsigned(s.queries), kWarp, (room + 2) * sizeof(Key), on}, top_k_scores_join_kernel, call,
             int(parts));
  };
  if (s.dtype == DType::f32)
    start(float());
  else
    with_type("top_k_scores_forward", s.dtype, start);
}

}  // namespace lspm::cuda
