// The objective of alternating least squares.
//
// A warp has a row of few entries, the whole block one of many. A group of lanes has the row's x in registers
// and takes every n-th entry, whose y it reads once. Terms are added up in float over a run of entries and in
// double beyond, over a block's rows in shared memory, and by a last block over the blocks in order; that one
// adds the trace of X'X Y'Y, too. Bytes of an entry: 4 K, and 8 to 16 for its column, value and weight.
#include "mf_als.cuh"

namespace lspm::cuda {
namespace {

constexpr int kMostFactors = 1024;
constexpr int kMostValues = kMostFactors / kWarp;  // of a row in a lane

constexpr int blocks_of(int values) { return values <= 8 ? 3 : values <= 16 ? 2 : 1; }

// The sum over a block's threads, given to the first.
__device__ __forceinline__ double block_sum(double value, int thread) {
  SHARED(double, sums, [kThreads]);
  sums[thread] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  return thread == 0 ? sums[0] : 0.0;
}

__device__ __forceinline__ int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) mf_als_count_kernel(const Csr csr, unsigned long long* counts) {
  const Entries entries = {nullptr, nullptr, csr, 0};
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t entry = int64_t(blockIdx.x) * kThreads + threadIdx.x; entry < csr.entries; entry += step)
    if (const int64_t column = entries.column(entry); column >= 0) atomicAdd(counts + column, 1ull);
}

template <int kValues, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_of(kValues))
    mf_als_loss_kernel(const float* factors, const Problem of, double* parts) {
  const int thread = thread_of_block(), warp = thread / kWarp;
  const int groups = kWarp / blockDim.x, group = threadIdx.y % groups;  // of a warp
  const Csr& csr = of.csr;
  double total = 0.0;  // in a group's first lane
  for (int of_all = 0; of_all < 2; ++of_all) {
    const int rank = of_all ? warp : 0, warps = of_all ? kWarps : 1;
    const int64_t step = int64_t(of_all ? 1 : kWarps) * gridDim.x;
    for (int64_t row = blockIdx.x + int64_t(of_all ? 0 : warp) * gridDim.x; row < csr.rows; row += step) {
      const int64_t begin = csr.indptr[row], end = csr.indptr[row + 1];
      if ((end - begin > kLong) != bool(of_all)) continue;
      Values<kValues, kWidth> x = {};
      x.load(factors + row * of.k, of.k);
      const float square = dot(x, x);
      if (rank == 0 && group == 0) total += double(of.reg(end - begin)) * square;
      const int64_t over = warps * groups;
      for (int64_t run = begin + rank * groups; run < end; run += kRun * over) {
        float sum = 0.0f;
        for (int64_t first = run, stop = min(end, run + kRun * over); first < stop; first += over) {
          const int64_t entry = first + group;
          const float* const other = entry < end ? of.row_of(entry) : nullptr;
          Values<kValues, kWidth> y = {};
          if (other) y.load(other, of.k);
          const float product = dot(x, y);
          if (entry < end) sum += other ? of.loss(entry, product) : NAN;
        }
        total += sum;
      }
    }
  }
  total = block_sum(threadIdx.x == 0 ? total : 0.0, thread);
  if (thread == 0) parts[blockIdx.x] = total;
}

// The columns' l |y|^2; counts: null where l is the same for all.
__global__ void __launch_bounds__(kThreads)
    mf_als_square_kernel(const Problem of, const unsigned long long* counts, double* parts) {
  const int64_t groups = blockDim.y, columns = of.csr.columns;
  double total = 0.0;
  for (int64_t first = blockIdx.x * groups; first < columns; first += gridDim.x * groups) {
    const int64_t column = first + threadIdx.y;
    float square = 0.0f;
    for (int64_t d = threadIdx.x; column < columns && d < of.k; d += blockDim.x) {
      const float y = of.other_factors[column * of.k + d];
      square += y * y;
    }
    square = group_sum(square);  // of all, as they meet in it
    if (column < columns) total += double(of.reg(counts ? int64_t(counts[column]) : 0)) * square;
  }
  total = block_sum(threadIdx.x == 0 ? total : 0.0, thread_of_block());
  if (thread_of_block() == 0) parts[blockIdx.x] = total;
}

// grams: X'X and Y'Y, k * k each, or null.
__global__ void __launch_bounds__(kThreads)
    mf_als_total_kernel(const double* parts, int count, const float* grams, int64_t elements, float* loss) {
  double total = 0.0;
  for (int n = threadIdx.x; n < count; n += kThreads) total += parts[n];
  if (grams)
    for (int64_t n = threadIdx.x; n < elements; n += kThreads)
      total += double(grams[n]) * grams[elements + n];
  total = block_sum(total, threadIdx.x);
  if (threadIdx.x == 0) *loss = float(total);
}

// Calls body(kernel, vectors of a row) for as few values of a lane as rows of k factors need.
template <int kWidth, int kValues = kWidth, class Body>
void with_values(int64_t k, Body body) {
  if (k <= kValues * kWarp) return body(mf_als_loss_kernel<kValues, kWidth>, k / kWidth);
  if constexpr (kValues < kMostValues)
    with_values<kWidth, 2 * kValues>(k, body);
  else
    throw std::invalid_argument("mf_als_loss: K must be at most " + std::to_string(kMostFactors) + ", got " +
                                std::to_string(k));
}

unsigned parts_of(int64_t rows) { return unsigned(rows < kMfAlsLossParts ? rows : kMfAlsLossParts); }

}  // namespace

void mf_als_loss(const float* factors, const float* other_factors, const Csr& csr, const float* values,
                 const float* weight, const float* grams, int64_t* scratch, float* loss, int64_t k,
                 const MfAlsOptions& options, int device, void* stream) {
  auto* const parts = reinterpret_cast<double*>(scratch);
  using Count = unsigned long long;  // which is what integers of 64 bits are added to atomically
  auto* const counts =
      options.reg_exponent == 0.0f ? nullptr : reinterpret_cast<Count*>(scratch + 2 * kMfAlsLossParts);
  const Problem problem = {{other_factors, values, csr, k}, weight, options};
  const auto on = cudaStream_t(stream);
  const auto run = [&](auto* kernel, int64_t vectors) {
    const DeviceGuard guard(device);
    const int lanes = lanes_of(vectors);
    const dim3 block(lanes, kThreads / lanes);
    const unsigned rows = parts_of(csr.rows), columns = parts_of((csr.columns + block.y - 1) / block.y);
    if (counts && csr.entries > 0)
      launch({parts_of((csr.entries + kThreads - 1) / kThreads), kThreads, 0, on}, mf_als_count_kernel, csr,
             counts);
    if (rows > 0) launch({rows, block, 0, on}, kernel, factors, problem, parts);
    if (columns > 0) launch({columns, block, 0, on}, mf_als_square_kernel, problem, counts, parts + rows);
    launch({1, kThreads, 0, on}, mf_als_total_kernel, parts, int(rows + columns), grams, k * k, loss);
  };
  constexpr int kWide = kVectorBytes / sizeof(float);
  if (k % kWide == 0 && aligned_for_vectors(factors, other_factors))
    with_values<kWide>(k, run);
  else
    with_values<1>(k, run);
}

}  // namespace lspm::cuda
