// The ratings that a matrix factorisation predicts, and the gradients of its tables.
//
// A group of lanes, as many as a row of factors has vectors of 16 bytes and at most a warp, owns a pair in
// the forward. In the backward, once for each table, pairs come sorted by the table's rows and a block owns
// some rows: a warp adds up a row of few pairs, the whole block one of many, each group of lanes every n-th
// pair in runs whose sums are added, so that a long sum rounds little. Shuffles and shared memory bring the
// groups' sums together in a fixed order, and a row is written once. Bytes of a pair of rows of b bytes:
// forward 2 b + 16 and its rating, backward b + 8 and the rating's gradient for each table.
#include "../mf.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocks = 4;     // of a multiprocessor, at least: what hides the time that a row takes to come
constexpr int kRun = 32;       // pairs of a group of lanes
constexpr int kLong = 128;     // pairs beyond which a row is the whole block's
constexpr int kMostRows = 32;  // of a block
constexpr int kManyBlocks = 1024;  // so many before a block takes several rows

__device__ __forceinline__ bool is_row(int64_t id, int64_t rows) { return uint64_t(id) < uint64_t(rows); }

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    mf_forward_kernel(const MfTables<const T> tables, const int64_t* __restrict__ users,
                      const int64_t* __restrict__ items, float mean, T* __restrict__ ratings,
                      const MfShape s) {
  const int64_t pair = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t user = pair < s.pairs ? users[pair] : -1, item = pair < s.pairs ? items[pair] : -1;
  const bool known = is_row(user, s.users) && is_row(item, s.items);  // the others still take part in sums
  float sums[kWidth] = {};
  for (int64_t d = int64_t(threadIdx.x) * kWidth; known && d < s.dim; d += int64_t(blockDim.x) * kWidth) {
    const Vec<T, kWidth> p = load<kWidth>(tables.user_factors + user * s.dim + d);
    const Vec<T, kWidth> q = load<kWidth>(tables.item_factors + item * s.dim + d);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums[e] += to_float(p.at[e]) * to_float(q.at[e]);
  }
  float total = sums[0];
#pragma unroll
  for (int e = 1; e < kWidth; ++e) total += sums[e];
  for (int distance = blockDim.x / 2; distance > 0; distance /= 2)
    total += __shfl_xor_sync(kAllLanes, total, distance);
  if (threadIdx.x > 0 || pair >= s.pairs) return;
  if (known && tables.user_bias) total += to_float(tables.user_bias[user]);
  if (known && tables.item_bias) total += to_float(tables.item_bias[item]);
  ratings[pair] = from_float<T>(known ? total + mean : NAN);
}

// What some pairs of a row add to the gradients of kWidth of its factors and of its bias.
template <int kWidth>
struct Sums {
  float factors[kWidth], bias;

  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) factors[e] += other.factors[e];
    bias += other.bias;
  }
  // Adds up the sums of a warp's groups of lanes; each has them then.
  __device__ __forceinline__ void add_groups() {
    for (int distance = blockDim.x; distance < kWarp; distance *= 2) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) factors[e] += __shfl_xor_sync(kAllLanes, factors[e], distance);
      bias += __shfl_xor_sync(kAllLanes, bias, distance);
    }
  }
};

// Pairs in the order of one table's rows, and that table's gradients, of which either may be null.
template <class T>
struct OneTable {
  const T *dratings, *others;
  const int64_t *ids, *other_ids;
  T *dfactors, *dbias;
  int64_t pairs, rows, other_rows, dim;  // dim: 0 where there is no dfactors

  // Where the pairs of a row begin, or those of the first row after it that has any.
  __device__ int64_t begin_of(int64_t row) const {
    int64_t begin = 0;
    for (int64_t end = pairs; begin < end;) {
      const int64_t middle = (begin + end) / 2;
      if (ids[middle] < row)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }

  // The sums of factors d to d + kWidth over every step-th pair from `first` up to `end`.
  template <int kWidth>
  __device__ __forceinline__ Sums<kWidth> sums(int64_t first, int64_t end, int step, int64_t d) const {
    Sums<kWidth> total = {};
    for (; first < end; first += kRun * step) {
      const int64_t last = min(end, first + kRun * step);
      Sums<kWidth> run = {};
#pragma unroll 4
      for (int64_t pair = first; pair < last; pair += step) {
        const float gradient = to_float(dratings[pair]);
        const int64_t other = d < dim ? other_ids[pair] : -1;
        const bool known = is_row(other, other_rows);
        Vec<T, kWidth> factors = {};
        if (known) factors = load<kWidth>(others + other * dim + d);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) run.factors[e] += to_float(factors.at[e]) * (known ? gradient : NAN);
        run.bias += gradient;
      }
      total.add(run);
    }
    return total;
  }

  template <int kWidth>
  __device__ __forceinline__ void write(const Sums<kWidth>& sums, int64_t row, int64_t d) const {
    if (d < dim) {
      Vec<T, kWidth> gradients;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) gradients.at[e] = from_float<T>(sums.factors[e]);
      store(dfactors + row * dim + d, gradients);
    }
    if (d == 0 && dbias) dbias[row] = from_float<T>(sums.bias);
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mf_backward_kernel(const OneTable<T> table, int rows_of_block) {
  SHARED(int64_t, begins, [kMostRows + 1]);
  SHARED(float, of_warps, [(kWidth + 1) * kThreads]);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / kWarp;
  const int64_t first = int64_t(blockIdx.x) * rows_of_block;
  const int count = int(min(int64_t(rows_of_block), table.rows - first));
  if (thread <= count) begins[thread] = table.begin_of(first + thread);
  __syncthreads();
  const auto is_long = [&](int n) { return begins[n + 1] - begins[n] > kLong; };
  const int groups = kWarp / blockDim.x;  // of a warp
  const bool first_group = thread % kWarp < blockDim.x;
  int64_t tile = 0;
  do {
    const int64_t d = tile + int(threadIdx.x) * kWidth;
    for (int n = warp; n < count; n += kWarps) {
      if (is_long(n)) continue;
      const int64_t own = begins[n] + threadIdx.y % groups;
      auto sums = table.template sums<kWidth>(own, begins[n + 1], groups, d);
      sums.add_groups();
      if (first_group) table.write(sums, first + n, d);
    }
    for (int n = 0; n < count; ++n) {
      if (!is_long(n)) continue;
      auto sums = table.template sums<kWidth>(begins[n] + threadIdx.y, begins[n + 1], blockDim.y, d);
      sums.add_groups();
#pragma unroll
      for (int e = 0; e < kWidth; ++e) of_warps[e * kThreads + thread] = sums.factors[e];
      of_warps[kWidth * kThreads + thread] = sums.bias;
      __syncthreads();
      if (warp == 0 && first_group) {
        for (int other = kWarp + thread; other < kThreads; other += kWarp) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sums.factors[e] += of_warps[e * kThreads + other];
          sums.bias += of_warps[kWidth * kThreads + other];
        }
        table.write(sums, first + n, d);
      }
      __syncthreads();  // before the next row's sums take their place
    }
    tile += int64_t(blockDim.x) * kWidth;
  } while (tile < table.dim);
}

// Groups of as many lanes as have something of a row.
dim3 block_shape(int64_t vectors) {
  int lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

template <class T>
void one_table(const OneTable<T>& table, cudaStream_t stream) {
  if (table.rows == 0) return;
  constexpr int kWide = kVectorBytes / sizeof(T);
  const bool wide = table.dim % kWide == 0 && aligned_for_vectors(table.others, table.dfactors);
  auto* kernel = wide ? mf_backward_kernel<T, kWide> : mf_backward_kernel<T, 1>;
  const int64_t shared_out = table.rows / kManyBlocks;
  const int rows = int(shared_out < 1 ? 1 : shared_out < kMostRows ? shared_out : kMostRows);
  launch({unsigned((table.rows + rows - 1) / rows), block_shape(table.dim / (wide ? kWide : 1)), 0, stream},
         kernel, table, rows);
}

}  // namespace

void mf_forward(const MfTables<const void>& tables, const int64_t* users, const int64_t* items, float mean,
                void* ratings, const MfShape& s, int device, void* stream) {
  with_types("mf_forward", s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    if (s.pairs == 0) return;
    constexpr int kWide = kVectorBytes / sizeof(T);
    const bool wide = s.dim % kWide == 0 && aligned_for_vectors(tables.user_factors, tables.item_factors);
    auto* kernel = wide ? mf_forward_kernel<T, kWide> : mf_forward_kernel<T, 1>;
    const MfTables<const T> of{
        static_cast<const T*>(tables.user_factors), static_cast<const T*>(tables.item_factors),
        static_cast<const T*>(tables.user_bias), static_cast<const T*>(tables.item_bias)};
    const DeviceGuard guard(device);
    const dim3 block = block_shape(s.dim / (wide ? kWide : 1));
    launch({unsigned((s.pairs + block.y - 1) / block.y), block, 0, cudaStream_t(stream)}, kernel, of, users,
           items, mean, static_cast<T*>(ratings), s);
  });
}

void mf_backward(const void* dratings, const MfTables<const void>& tables, const int64_t* users,
                 const int64_t* items, const MfTables<void>& gradients, const MfShape& s, int device,
                 void* stream) {
  const bool of_users = gradients.user_factors || gradients.user_bias;
  const bool of_items = gradients.item_factors || gradients.item_bias;
  if (of_users && of_items)
    throw std::invalid_argument("mf_backward: gradients must be of one table at a time, got both");
  if (!of_users && !of_items) return;
  with_types("mf_backward", s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    const void* const others = of_users ? tables.item_factors : tables.user_factors;
    void* const dfactors = of_users ? gradients.user_factors : gradients.item_factors;
    void* const dbias = of_users ? gradients.user_bias : gradients.item_bias;
    const OneTable<T> table{static_cast<const T*>(dratings),
                            static_cast<const T*>(others),
                            of_users ? users : items,
                            of_users ? items : users,
                            static_cast<T*>(dfactors),
                            static_cast<T*>(dbias),
                            s.pairs,
                            of_users ? s.users : s.items,
                            of_users ? s.items : s.users,
                            dfactors ? s.dim : 0};
    const DeviceGuard guard(device);
    one_table(table, cudaStream_t(stream));
  });
}

}  // namespace lspm::cuda
