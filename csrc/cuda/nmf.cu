// A multiplicative update of a non-negative factor.
//
// A block owns some rows: a warp updates a row of few entries, the whole block one of many. A group of lanes,
// as many as a row of factors has vectors of 16 bytes and at most a warp, takes every n-th entry: each lane
// has its factors of p and of y in registers, shuffles give <p, y> to all, and y goes into both sums while it
// is there. Shuffles and shared memory bring the groups' sums together in a fixed order, and p is written
// once. Bytes of an entry: 4 K, and 8 to 12 for its column and value; of a row 8 K.
#include "../nmf.h"
#include "csr_rows.cuh"

namespace lspm::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLong = 128;  // entries beyond which a row is the whole block's
constexpr int kMostFactors = 1024;
constexpr int kMostValues = kMostFactors / kWarp;  // of a row in a lane

// Of a multiprocessor, at least, by the values of a lane: left to itself, ptxas aims at more and spills.
constexpr int blocks_of(int values) { return values <= 4 ? 4 : values <= 8 ? 2 : 1; }

// What stands above the fraction and below it.
template <int kValues, int kWidth>
struct Fraction {
  Values<kValues, kWidth> above, below;

  // The sums over a group's entries: of `groups` from `first` on one each, and so on every `step` up to end.
  __device__ __forceinline__ void add_entries(const Entries& of, const Values<kValues, kWidth>& p,
                                              int64_t first, int64_t end, int group, int step) {
    constexpr int kInFlight = kValues <= 4 ? 4 : kValues <= 8 ? 2 : 1;  // entries, as far as registers go
    // All lanes of a warp go round as often, as they meet in the shuffles.
#pragma unroll kInFlight
    for (int64_t begin = first; begin < end; begin += step) {
      const int64_t entry = begin + group;
      const float* const row = entry < end ? of.row_of(entry) : nullptr;
      const float value = entry < end ? of.values[entry] : 0.0f;
      Values<kValues, kWidth> y = {};
      if (row) y.load(row, of.k);
      float product = 0.0f;
#pragma unroll
      for (int n = 0; n < kValues; ++n) product += p.at[n] * y.at[n];
      for (int distance = blockDim.x / 2; distance > 0; distance /= 2)
        product += __shfl_xor_sync(kAllLanes, product, distance);
#pragma unroll
      for (int n = 0; n < kValues; ++n) {
        above.at[n] += value * y.at[n];
        below.at[n] += product * y.at[n];
      }
    }
    above.add_groups();
    below.add_groups();
  }
  __device__ __forceinline__ void update(Values<kValues, kWidth> p, float* row, int64_t cols, float shrink,
                                         float eps) const {
#pragma unroll
    for (int n = 0; n < kValues; ++n)
      p.at[n] = p.at[n] * above.at[n] / (below.at[n] + (shrink * p.at[n] + eps));
    p.store(row, cols);
  }
};

template <int kValues, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_of(kValues))
    nmf_kernel(float* factors, const Entries of, int rows_of_block, float reg, float eps) {
  DYNAMIC_SHARED(memory);
  float* const of_warps = reinterpret_cast<float*>(memory);  // [kWarps][k], the one part and then the other
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / kWarp;
  const int groups = kWarp / blockDim.x, group = threadIdx.y % groups;  // of a warp
  const int64_t first = int64_t(blockIdx.x) * rows_of_block;
  const int count = int(min(int64_t(rows_of_block), of.csr.rows - first));
  const int64_t* const begins = of.csr.indptr + first;
  const auto is_long = [&](int n) { return begins[n + 1] - begins[n] > kLong; };
  for (int n = warp; n < count; n += kWarps) {
    if (is_long(n)) continue;
    float* const row = factors + (first + n) * of.k;
    Values<kValues, kWidth> p = {};
    p.load(row, of.k);
    Fraction<kValues, kWidth> fraction = {};
    fraction.add_entries(of, p, begins[n], begins[n + 1], group, groups);
    __syncwarp();  // every group has read p
    if (group == 0) fraction.update(p, row, of.k, float(begins[n + 1] - begins[n]) * reg, eps);
  }
  for (int n = 0; n < count; ++n) {
    if (!is_long(n)) continue;
    float* const row = factors + (first + n) * of.k;
    Values<kValues, kWidth> p = {};
    p.load(row, of.k);
    Fraction<kValues, kWidth> fraction = {};
    fraction.add_entries(of, p, begins[n] + warp * groups, begins[n + 1], group, kWarps * groups);
    const auto add_warps = [&](Values<kValues, kWidth>& part) {
      if (group == 0) part.store(of_warps + warp * of.k, of.k);
      __syncthreads();
      if (warp == 0 && group == 0)
#pragma unroll 1  // unrolled, its loads would take registers that all threads lack
        for (int other = 1; other < kWarps; ++other) {
          Values<kValues, kWidth> sums = {};
          sums.load(of_warps + other * of.k, of.k);
#pragma unroll
          for (int i = 0; i < kValues; ++i) part.at[i] += sums.at[i];
        }
      __syncthreads();  // every warp has read p, and the next part takes the place
    };
    add_warps(fraction.above);
    add_warps(fraction.below);
    if (warp == 0 && group == 0) fraction.update(p, row, of.k, float(begins[n + 1] - begins[n]) * reg, eps);
  }
}

// Calls body(kernel, vectors of a row) for as few values of a lane as rows of k factors need.
template <int kWidth, int kValues = kWidth, class Body>
void with_values(int64_t k, Body body) {
  if (k <= kValues * kWarp) return body(nmf_kernel<kValues, kWidth>, k / kWidth);
  if constexpr (kValues < kMostValues)
    with_values<kWidth, 2 * kValues>(k, body);
  else
    throw std::invalid_argument("nmf_update: K must be at most " + std::to_string(kMostFactors) + ", got " +
                                std::to_string(k));
}

}  // namespace

void nmf_update(float* factors, const float* other_factors, const Csr& csr, const float* values, int64_t k,
                float reg, float eps, int device, void* stream) {
  const auto start = [&](auto* kernel, int64_t vectors) {
    if (csr.rows == 0 || k == 0) return;
    const int lanes = lanes_of(vectors);
    const int rows = rows_of_block(csr.rows);
    const DeviceGuard guard(device);
    launch({unsigned((csr.rows + rows - 1) / rows), dim3(lanes, kThreads / lanes),
            size_t(kWarps * k) * sizeof(float), cudaStream_t(stream)},
           kernel, factors, Entries{other_factors, values, csr, k}, rows, reg, eps);
  };
  constexpr int kWide = kVectorBytes / sizeof(float);
  if (k % kWide == 0 && aligned_for_vectors(factors, other_factors))
    with_values<kWide>(k, start);
  else
    with_values<1>(k, start);
}

}  // namespace lspm::cuda
