// What the CUDA kernels of attention share: tiles in shared memory and in registers, windows, scores,
// dropout.
//
// A tile in shared memory has rows of kDim elements of 16 bits. The 16-byte chunk c of row r lies at chunk
// c ^ r % 8, so that neither ldmatrix, nor copies, nor the stores of accumulators meet a bank twice. A warp
// owns 16 kRows rows of a product, and of these a lane the rows lane / 4 + 8 h of each 16: d[r][n][2 h + e]
// is row 16 r + 8 h + lane / 4, column 8 n + 2 (lane % 4) + e.
#pragma once
#include <initializer_list>

#include "../attention.h"
#include "philox.cuh"
#include "ptx.cuh"

namespace lspm::cuda {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kFar = 1 << 30;  // more than there are queries or keys

// The rows of one head of one sequence, in global memory.
template <class T>
struct Rows {
  T* data;
  int64_t stride, page_stride;
  const int32_t* pages;
  int page_rows, rows, dim;

  __device__ Rows(const HeadsView& view, int64_t batch, int64_t head, int rows, int64_t dim)
      : data(view.pages ? static_cast<T*>(view.data) + head * view.head_stride +
                              (view.starts ? view.starts[batch] * view.row_stride : 0)
                        : view.at<T>(batch, head)),
        stride(view.row_stride),
        page_stride(view.batch_stride),
        pages(view.pages ? view.pages + batch * view.page_columns : nullptr),
        page_rows(int(view.page_rows)),
        rows(rows),
        dim(int(dim)) {}

  // Where a row of a paged tensor lies, after `data`.
  __device__ __forceinline__ int64_t paged(int row) const {
    const int page = row / page_rows;
    return pages[page] * page_stride + (row - page * page_rows) * stride;
  }
};

// Starts to copy kCount rows from `first` on into a tile; zeros behind the last
// row and column. `aligned`: to 16 bytes, with a dim that is a multiple of a chunk; else the copy is complete
// at the next barrier. kTogether: all pages are asked for first, as each answer takes long.
template <bool kGeneral, int kDim, int kCount, int kThreads, bool kTogether = false, class T>
__device__ __forceinline__ void load_tile(T* tile, const Rows<T>& from, int first, bool aligned) {
  constexpr int kChunks = kDim / kChunk, kStep = kThreads / kChunks;
  const unsigned own_row = threadIdx.x / kChunks, col = threadIdx.x % kChunks * kChunk;
  const int count = int(col) < from.dim ? from.rows - first - int(own_row) : 0;
  const T* source = from.data + int(first + own_row) * from.stride + col;
  int64_t pages[kTogether ? kCount / kStep : 1];
  if (kTogether && from.pages) {
#pragma unroll
    for (int row = 0; row < kCount; row += kStep)
      if (row < count) pages[row / kStep] = from.paged(first + own_row + row);
  }
#pragma unroll
  for (int row = 0; row < kCount; row += kStep, source += kStep * from.stride) {
    const unsigned permuted = kStep % 8 ? own_row + row : own_row;  // % 8 the same, and so one address
    T* const to = tile + (own_row + row) * kDim + (col ^ permuted % 8 * kChunk);
    const bool valid = row < count;
    if (kGeneral && from.pages && valid)
      source = from.data + (kTogether ? pages[row / kStep] : from.paged(first + own_row + row)) + col;
    if (!kGeneral || aligned) {
      ptx::cp_async16(to, source, valid);  // reads nothing where not valid
    } else {
      Vec<T, kChunk> v;
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        v.at[e] = valid && int(col) + e < from.dim ? source[e] : from_float<T>(0.0f);
      store(to, v);
    }
  }
}

// Which rows of a tile are a warp's: row 16 r + 8 h + i of its own, i < 8, is row
// first + r kDown + h kApart + i of the tile.
template <int kDown, int kApart>
struct Share {
  int first;
  __device__ int row(int r, int h) const { return first + r * kDown + h * kApart; }
};

// Where a lane's rows for ldmatrix begin in a tile, in its first 16 columns. Of the four matrices the second
// and third lie below the first and beside it, or the reverse.
template <int kDim>
__device__ __forceinline__ int lane_place(bool below_first, int apart = 8) {
  const int lane = threadIdx.x % kWarp, i = lane % 8, second = lane / 8 % 2, third = lane / 16;
  const int down = below_first ? second : third, across = below_first ? third : second;
  return (down * apart + i) * kDim + (across ^ i) * kChunk;
}

// That place in the 16 columns from 16 k on. The chunk's upper bits are not
// permuted: 8 chunks share an address.
__device__ __forceinline__ int at_columns(int place, int k) { return (place ^ 16 * (k % 4)) + 64 * (k / 4); }

// One fragment of 16 x 16 elements for each 16 rows of a warp.
template <int kDim, int kRows, class T, class Share>
__device__ __forceinline__ void load_rows(uint32_t (&a)[kRows][4], const T* tile, const Share& share,
                                          int place, int k) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    ptx::ldmatrix_x4(a[r], tile + share.row(r, 0) * kDim + at_columns(place, k));
}

// d = rows times the transpose of a tile: row(a, k) gives the fragments of
// columns 16 k to 16 k + 15.
template <int kDim, int kRows, int kTiles, class T, class LoadRows>
__device__ __forceinline__ void multiply_transpose(float (&d)[kRows][kTiles][4], const T* tile,
                                                   LoadRows rows) {
  const int place = lane_place<kDim>(false);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[r][n][i] = 0.0f;
#pragma unroll 4  // wholly unrolled, ptxas moves so many loads up that it spills
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kRows][4];
    rows(a, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, tile + 8 * n * kDim + at_columns(place, k));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        ptx::mma_16816<T>(d[r][n], a[r], low);
        ptx::mma_16816<T>(d[r][n + 1], a[r], high);
      }
    }
  }
}

// d += a times columns of a tile of 16 kFactors rows, as many as d has.
template <int kDim, int kRows, int kTiles, int kFactors, class T>
__device__ __forceinline__ void multiply_add(float (&d)[kRows][kTiles][4],
                                             const uint32_t (&a)[kRows][kFactors][4], const T* tile) {
  const int place = lane_place<kDim>(true);
#pragma unroll
  for (int k = 0; k < kFactors; ++k) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4<true>(b, tile + 16 * k * kDim + at_columns(place, n / 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        ptx::mma_16816<T>(d[r][n], a[r][k], low);
        ptx::mma_16816<T>(d[r][n + 1], a[r][k], high);
      }
    }
  }
}

// A product as the left factor of the next one.
template <class T, int kRows, int kTiles>
__device__ __forceinline__ void as_factor(uint32_t (&a)[kRows][kTiles / 2][4],
                                          const float (&d)[kRows][kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      a[r][n / 2][n % 2 * 2] = ptx::pack<T>(d[r][n][0], d[r][n][1]);
      a[r][n / 2][n % 2 * 2 + 1] = ptx::pack<T>(d[r][n][2], d[r][n][3]);
    }
}

// Rounds d times its rows' factors and writes it to the rows of `to` from
// `first` on, in columns from `column` on, a multiple of 64; in whole chunks
// through that part of a tile, which no other warp touches any more.
template <int kDim, int kRows, int kTiles, class T, class Share>
__device__ __forceinline__ void store_rows(const float (&d)[kRows][kTiles][4],
                                           const float (&factor)[kRows][2], T* tile, const Share& share,
                                           const Rows<T>& to, int first, bool aligned, int column = 0) {
  __syncwarp();  // the other lanes have read what lay there
  tile += column;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* const row = tile + (share.row(r, h) + lane_row()) * kDim + lane_column();
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        *reinterpret_cast<uint32_t*>(row + (n ^ lane_row()) * kChunk) =
            ptx::pack<T>(d[r][n][2 * h] * factor[r][h], d[r][n][2 * h + 1] * factor[r][h]);
    }
  __syncwarp();
#pragma unroll 4
  for (int i = threadIdx.x % kWarp; i < 16 * kRows * kTiles; i += kWarp) {
    const int own = i / kTiles, chunk = i % kTiles, col = column + chunk * kChunk;
    const int row = share.row(own / 16, own / 8 % 2) + own % 8;
    if (first + row >= to.rows || col >= to.dim) continue;
    const Vec<T, kChunk> v = load<kChunk>(tile + row * kDim + (chunk ^ own % 8) * kChunk);
    T* const at = to.data + (first + row) * to.stride + col;
    if (aligned) {
      store(at, v);
    } else {
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        if (col + e < to.dim) at[e] = v.at[e];
    }
  }
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// Query i sees the keys from i + low to below i + high.
struct Window {
  int queries, keys, low, high;

  __device__ static int near(int64_t key) { return int(key < -kFar ? -kFar : key > kFar ? kFar : key); }
  __device__ explicit Window(const AttentionShape& s)
      : queries(int(s.queries)),
        keys(int(s.keys)),
        low(s.left < 0 ? -kFar : near(s.shift - s.left)),
        high(s.right < 0 ? kFar : near(s.shift + s.right + 1)) {}

  __device__ int first_key(int query) const { return max(query + low, 0); }
  __device__ int end_key(int query) const { return min(keys, max(query + high, 0)); }
  // The queries that see one of the keys `first` to `last`, or more.
  __device__ int first_query(int first) const { return int(max(int64_t(first) - high + 1, int64_t(0))); }
  __device__ int end_query(int last) const {
    return int(min(max(int64_t(last) - low + 1, int64_t(0)), int64_t(queries)));
  }
  __device__ bool hides(int query, int key) const {
    return unsigned(key - query) - unsigned(low) >= unsigned(high) - unsigned(low) || key >= keys;
  }
};

// What a kernel knows of a call beside its tensors.
struct AttentionCall {
  AttentionShape shape;
  AttentionExtras extras;
  float exponent;      // what powers of 2 take times a score; where there are no
                       // extras, times a product
  float unit;          // a score for a product; 1 where there are extras
  float kept;          // 1 / (1 - dropout)
  uint32_t threshold;  // words below it drop
  bool drops, aligned, general;
};

// general: whether the call needs the kernels that know extras, views without
// alignment and pages, anyway.
inline AttentionCall attention_call(const AttentionShape& shape, const AttentionExtras& extras,
                                    std::initializer_list<const HeadsView*> views, bool general) {
  bool aligned = (shape.head_dim | shape.value_dim) % kChunk == 0, paged = false;
  for (const HeadsView* view : views) {
    aligned &= (view->batch_stride | view->head_stride | view->row_stride) % kChunk == 0;
    aligned &= aligned_for_vectors(view->data);
    paged |= view->pages != nullptr;
  }
  general = general || !aligned || paged || extras.bias.data || extras.mask.data || extras.slopes.data ||
            shape.softcap != 0.0f || shape.dropout > 0.0 || !(shape.scale > 0.0f);
  return {shape,
          extras,
          general ? kLog2e : shape.scale * kLog2e,
          general ? 1.0f : shape.scale,
          float(1.0 / (1.0 - shape.dropout)),
          uint32_t(shape.dropout < 1.0 ? shape.dropout * 4294967296.0 : 0.0),
          shape.dropout > 0.0,
          aligned,
          general};
}

// Calls body(Tile<dim, general>()) for the least padded dim.
template <template <int, bool> class Tile, class Body>
void with_tile(const AttentionCall& call, Body body) {
  const int64_t dim = max(call.shape.head_dim, call.shape.value_dim);
  if (dim <= 64) return call.general ? body(Tile<64, true>()) : body(Tile<64, false>());
  if (dim <= 128) return call.general ? body(Tile<128, true>()) : body(Tile<128, false>());
  call.general ? body(Tile<256, true>()) : body(Tile<256, false>());
}

// Which scores of a tile dropout keeps: bit 4 n + i of kept[r] for [r][n][i],
// from the query and the key of the tile's first row and column on. All words
// of a counter are used where a tile has 64 keys.
template <int kRows, int kTiles, class Share>
__device__ __forceinline__ void draw_kept(uint32_t (&kept)[kRows], const AttentionCall& call, int batch,
                                          int head, int query, int key, const Share& share) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    kept[r] = 0;
#pragma unroll
    for (int of = 0; of < 8; ++of) {  // two rows, two tiles of 8 columns that no
                                      // counter shares, two columns
      const int h = of / 4, odd = of / 2 % 2, e = of % 2;
      uint32_t x[4] = {uint32_t(key / 64 * 16 + 8 * odd + lane_column() + e),
                       uint32_t(query + share.row(r, h) + lane_row()), uint32_t(head), uint32_t(batch)};
      philox(call.shape.seed, x);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int n = 2 * (word - (kTiles < 8 ? key / 16 % 4 : 0)) + odd;
        if (n >= 0 && n < kTiles && x[word] >= call.threshold) kept[r] |= 1u << (4 * n + 2 * h + e);
      }
    }
  }
}

// The same of a transposed tile, whose rows are keys. The warp's rows 16 apart
// share a counter.
template <int kRows, int kTiles, class Share>
__device__ __forceinline__ void draw_kept_transposed(uint32_t (&kept)[kRows], const AttentionCall& call,
                                                     int batch, int head, int query, int key,
                                                     const Share& share) {
  static_assert(kRows <= 2, "four keys to a counter");
#pragma unroll
  for (int r = 0; r < kRows; ++r) kept[r] = 0;
  const int place = key + share.first + lane_row(), word = place / 16 % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t x[4] = {uint32_t(place / 64 * 16 + place % 16), uint32_t(query + 8 * n + lane_column() + e),
                       uint32_t(head), uint32_t(batch)};
      philox(call.shape.seed, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t drawn = kRows == 1 && word ? x[2 + h] : x[2 * r + h];
          if (drawn >= call.threshold) kept[r] |= 1u << (4 * n + 2 * h + e);
        }
    }
}

// The elements of a bias or mask that a fragment's lie beside; 0 outside. One
// type for all four, so that the branches are not one for each.
template <class Query, class Key>
__device__ __forceinline__ void load_scores(float (&to)[4], const ScoresView& view, int64_t head,
                                            const Window& window, Query query, Key key) {
  int64_t at[4];
  bool inside[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    at[i] = head + query(i) * view.row_stride + key(i) * view.key_stride;
    inside[i] = query(i) < window.queries && key(i) < window.keys;
  }
  const auto load = [&](auto type) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] = inside[i] ? to_float(static_cast<const decltype(type)*>(view.data)[at[i]]) : 0.0f;
  };
  switch (view.dtype) {
    case DType::f32:
      return load(float());
    case DType::bf16:
      return load(bf16());
    case DType::f16:
      return load(f16());
    default:
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[i] = inside[i] && !static_cast<const uint8_t*>(view.data)[at[i]] ? -INFINITY : 0.0f;
  }
}

// What stands between products and scores of one head: the scale, the cap, the
// slope, bias and mask.
struct Scores {
  const AttentionCall& call;
  const Window& window;
  int64_t bias, mask;  // where the head's begin
  float slope;
  int shift;

  __device__ Scores(const AttentionCall& call, const Window& window, const AttentionShape& shape,
                    int64_t batch, int64_t head)
      : call(call), window(window), bias(0), mask(0), slope(0.0f), shift(int(shape.shift)) {
    const AttentionExtras& x = call.extras;
    if (x.bias.data) bias = batch * x.bias.batch_stride + head * x.bias.head_stride;
    if (x.mask.data) mask = batch * x.mask.batch_stride + head * x.mask.head_stride;
    if (x.slopes.data)
      slope = static_cast<const float*>(
          x.slopes.data)[batch * x.slopes.batch_stride + head * x.slopes.head_stride];
  }

  // Turns four products into scores. cap_slope: what of a score's gradient the
  // cap leaves.
  template <class Query, class Key>
  __device__ __forceinline__ void apply(float (&s)[4], float (&cap_slope)[4], Query query, Key key) const {
    const AttentionExtras& x = call.extras;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] *= call.shape.scale;
    if (const float cap = call.shape.softcap; cap != 0.0f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // tanh(x) = 1 - 2 / (1 + exp(2 x))
        const float part = 1.0f - __fdividef(2.0f, 1.0f + ptx::ex2(s[i] * (2.0f * kLog2e / cap)));
        cap_slope[i] = 1.0f - part * part;
        s[i] = part * cap;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) cap_slope[i] = 1.0f;
    }
    if (x.slopes.data) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] -= slope * fabsf(float(query(i) + shift - key(i)));
    }
    float added[4];
    if (x.bias.data) {
      load_scores(added, x.bias, bias, window, query, key);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] += added[i];
    }
    if (x.mask.data) {
      load_scores(added, x.mask, mask, window, query, key);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = added[i] == -INFINITY ? added[i] : s[i] + added[i];
    }
  }
};

// What the scores of a row are powers under: their maximum, or 0 where all are
// hidden.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Beyond this, rounding the maximum times the exponent could change a row's
// scale by more than 2^-12, and far beyond overflow; then the maximum is
// subtracted first, which is exact.
constexpr float kLarge = 4096.0f;

// Turns a tile's scores into powers under the rows' new maxima; adds them to a
// lane's part of the totals.
template <int kRows, int kTiles, int kSums>
__device__ __forceinline__ void online_softmax(float (&s)[kRows][kTiles][4], float (&maximum)[kRows][2],
                                               float (&total)[kRows][2], float (&sums)[kRows][kSums][4],
                                               float exponent) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = maximum[r][h];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) largest = fmaxf(largest, fmaxf(s[r][n][2 * h], s[r][n][2 * h + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float base = base_of(largest);
      float shift = base * exponent;
      float shrink = ptx::ex2(maximum[r][h] * exponent - shift);
      if (fabsf(shift) > kLarge) {
        shrink = ptx::ex2((maximum[r][h] - base) * exponent);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) s[r][n][2 * h] -= base, s[r][n][2 * h + 1] -= base;
        shift = 0.0f;
      }
      maximum[r][h] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[r][n][i] = ptx::ex2(fmaf(s[r][n][i], exponent, -shift));
          sum += s[r][n][i];
        }
      total[r][h] = total[r][h] * shrink + sum;
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[r][n][2 * h] *= shrink, sums[r][n][2 * h + 1] *= shrink;
    }
}

// What sums under a row's maximum are worth as sums under 2^power, which is near it. Where rounding a huge
// maximum parts them by more than float has exponents, at least the quotient of two such sums stays right.
__device__ __forceinline__ float rebase(float maximum, float exponent, float power) {
  const float base = base_of(maximum), shift = base * exponent;
  const float apart = fmaf(base, exponent, -power);
  return ptx::ex2(fabsf(shift) > kLarge ? fminf(fmaxf(apart, -100.0f), 100.0f) : shift - power);
}

struct ForwardCall : AttentionCall {
  HeadsView q, k, v, out;
  float *lse, *statistics;
};

// attention_decode.cu: the forward where the keys are divided among `splits`
// blocks; and whether it takes a call. scratch: (splits, rows(), value_dim +
// 2).
bool decodes(const AttentionShape& shape, const AttentionExtras& extras);
void attention_decode(const ForwardCall& call, float* scratch, int splits, cudaStream_t stream);

}  // namespace lspm::cuda
