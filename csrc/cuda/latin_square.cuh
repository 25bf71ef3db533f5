// What the updates of tables by pairs of their rows share. The square's blocks of one step share no row, so
// they run at once, and the steps one after the other: a launch for each.
//
// A warp owns a block and goes through its pairs in order. A lane has the same factors of every row, and the
// first lane the row's bias and sum of squares, so that no row needs a barrier. Rows are not waited for: a
// lane looks up one of the next 32 pairs and has its rows fetched into the second-level cache; a pair's rows
// are loaded before those of the pair before it change; and what both have in common stays in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "ptx.cuh"

namespace lspm::cuda {

constexpr int kSpread = 64;  // blocks of a step up to which each has a multiprocessor to itself
constexpr int kWarps = 4;    // of a block of threads beyond: one for each scheduler of a multiprocessor
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocks = 2;   // of a multiprocessor: few run at once, and each may have all registers it wants
constexpr int kSector = 32;  // bytes that the second-level cache fetches at least
constexpr int kMostValues = 16;  // of a row in a lane: 512 factors

// Rows of factors, and what goes with each, or null.
template <class T>
struct Table {
  T* factors;
  float *bias, *squares;
  int64_t rows;
  int cols;

  __device__ bool has(int32_t id) const { return uint32_t(id) < uint64_t(rows); }
  __device__ T* row(int32_t id) const { return factors + int64_t(id) * cols; }
  __device__ void fetch(int32_t id) const {
    const char* const from = reinterpret_cast<const char*>(row(id));
    for (int at = 0; at < cols * int(sizeof(T)); at += kSector) ptx::prefetch(from + at);
  }
};

__device__ __forceinline__ bool first_lane() { return threadIdx.x == 0; }

// A row as a warp holds it: kValues factors in each lane, in vectors of kWidth.
template <class T, int kValues, int kWidth>
struct Row {
  using Element = T;
  Vec<T, kWidth> vectors[kValues / kWidth];
  float bias = 0.0f, squares = 0.0f;  // of no meaning but in the first lane

  // Calls body(n, k) for this lane's factors, the n-th of which is the row's k-th.
  template <class Body>
  __device__ __forceinline__ static void for_each_factor(int cols, Body body) {
#pragma unroll
    for (int v = 0; v < kValues / kWidth; ++v) {
      const int k = (v * kWarp + int(threadIdx.x)) * kWidth;
      if (k >= cols) continue;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) body(v * kWidth + e, k + e);
    }
  }

  __device__ __forceinline__ float operator[](int n) const {
    return to_float(vectors[n / kWidth].at[n % kWidth]);
  }
  __device__ __forceinline__ void set(int n, float value) {
    vectors[n / kWidth].at[n % kWidth] = from_float<T>(value);
  }

  __device__ __forceinline__ void load(const Table<T>& table, int32_t id) {
    const T* const row = table.row(id);
#pragma unroll
    for (int v = 0; v < kValues / kWidth; ++v) {
      const int k = (v * kWarp + int(threadIdx.x)) * kWidth;
      if (k < table.cols) vectors[v] = cuda::load<kWidth>(row + k);
    }
    if (!first_lane()) return;
    if (table.bias) bias = table.bias[id];
    if (table.squares) squares = table.squares[id];
  }
  __device__ __forceinline__ void store(const Table<T>& table, int32_t id) const {
    T* const row = table.row(id);
#pragma unroll
    for (int v = 0; v < kValues / kWidth; ++v) {
      const int k = (v * kWarp + int(threadIdx.x)) * kWidth;
      if (k < table.cols) cuda::store(row + k, vectors[v]);
    }
    if (!first_lane()) return;
    if (table.bias) table.bias[id] = bias;
    if (table.squares) table.squares[id] = squares;
  }
};

// What one lane knows of a pair, for all of them.
template <class Pair>
__device__ __forceinline__ Pair broadcast(const Pair& mine, int lane) {
  int words[sizeof(Pair) / sizeof(int)];
  memcpy(words, &mine, sizeof mine);
#pragma unroll
  for (int& word : words) word = __shfl_sync(kAllLanes, word, lane);
  Pair pair;
  memcpy(&pair, words, sizeof pair);
  return pair;
}

// A warp's block of the square, and its pairs. What the offsets say is held to the pairs that there are.
struct Block {
  int64_t index, part, begin, end;
  __device__ Block(const int64_t* offsets, int64_t grid, int64_t step, int64_t pairs)
      : part(int64_t(blockIdx.x) * blockDim.y + threadIdx.y) {
    index = step * grid + part;
    begin = end = 0;
    if (part >= grid) return;
    begin = offsets[index] > 0 ? offsets[index] : 0;
    end = offsets[index + 1] < pairs ? offsets[index + 1] : pairs;
  }
};

// Calls update(j, pair, rows) for the pairs of a block, in order. job.pair(j) looks up a pair, whose user is
// -1 where there is nothing to do; job.fetch(pair) has its rows fetched, job.load(rows, pair, before) loads
// those that the pair before it has not, and job.keep(rows, pair, before, rows of before) keeps the others.
template <class Job, class Update>
__device__ __forceinline__ void for_each_pair(Job& job, const Block& block, Update update) {
  using Pair = typename Job::Pair;
  const auto look_up = [&](int64_t j) {
    Pair pair;
    if (j < block.end) pair = job.pair(j);
    if (pair.user >= 0) job.fetch(pair);
    return pair;
  };
  const int lane = threadIdx.x;
  Pair mine = look_up(block.begin + lane), now, next = broadcast(mine, 0);
  typename Job::Rows rows, coming;
  job.load(coming, next, now);
  for (int64_t first = block.begin; first < block.end; first += kWarp) {
    const Pair ahead = look_up(first + kWarp + lane);
    const int count = block.end - first < kWarp ? int(block.end - first) : kWarp;
    for (int n = 0; n < count; ++n) {
      now = next;
      rows = coming;
      next = broadcast(n + 1 < kWarp ? mine : ahead, (n + 1) % kWarp);
      job.load(coming, next, now);
      if (now.user >= 0) update(first + n, now, rows);
      job.keep(coming, next, now, rows);
    }
    mine = ahead;
  }
}

// Calls body(Row<T, kValues, kWidth>()) with as few values as rows of `cols` need, in vectors where those
// fit.
template <class T, int kValues = 1, class Body>
void with_row(const char* op, int64_t cols, bool aligned, Body body) {
  constexpr int kWidth = std::min(kValues, int(kVectorBytes / sizeof(T)));
  if (cols <= kValues * kWarp) {
    if (aligned && cols % kWidth == 0) return body(Row<T, kValues, kWidth>());
    return body(Row<T, kValues, 1>());
  }
  if constexpr (kValues < kMostValues)
    with_row<T, 2 * kValues>(op, cols, aligned, body);
  else
    throw std::invalid_argument(std::string(op) + ": factors must be at most " +
                                std::to_string(kMostValues * kWarp) + ", got " + std::to_string(cols));
}

// Starts kernel(arguments..., step) for each step of the square, a warp for each block.
template <class... Parameters, class... Arguments>
void launch_steps(int64_t grid, void* stream, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const int warps = grid > kSpread ? kWarps : 1;
  for (int64_t step = 0; step < grid; ++step)
    launch({unsigned((grid + warps - 1) / warps), dim3(kWarp, warps), 0, cudaStream_t(stream)}, kernel,
           arguments..., step);
}

}  // namespace lspm::cuda
