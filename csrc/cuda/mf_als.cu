// Alternating least squares.
//
// Cholesky: a block owns a row. Its matrix never leaves the registers: a thread has a square tile of it, adds
// up the entries' outer products from rows y staged in shared memory, and takes part in the factorisation and
// in both substitutions, so that shared memory has a few columns of L and the right side, and no K x K.
// Conjugate gradient: a warp owns a row of few entries, the whole block one of many. x, r, p and the product
// with the matrix are in the registers of a group of lanes, which take every n-th entry; a step reads the
// entries' y and, implicit, Y'Y, which the warps of a block read through the first-level cache together.
// Bytes of an entry, and for conjugate gradient of a step: 4 K, from the second-level cache where Y fits.
#include "mf_als.cuh"

namespace lspm::cuda {
namespace {

// ---- Cholesky

constexpr int kMostSolved = 248;  // factors: 496 tiles of 8 x 8, and 512 threads can have 128 registers each
constexpr int kApart = 128;       // entries whose sums are added up apart, so that a long sum rounds little
constexpr int kSmall = 64;        // factors up to which tiles are 4 x 4, so that a block has threads enough

// Tiles on and below the diagonal of a matrix of so many tile rows.
__host__ __device__ constexpr int tiles_of(int rows) { return rows * (rows + 1) / 2; }
__host__ __device__ constexpr int threads_for(int tiles) { return (tiles + kWarp - 1) / kWarp * kWarp; }
constexpr int most_threads(int side) {
  return threads_for(tiles_of((side == 4 ? kSmall : kMostSolved) / side));
}
// Of a multiprocessor, at least: left to itself, ptxas aims at more and spills.
constexpr int solving_blocks(int side) { return side == 4 ? 4 : 1; }

// Where a block of tiles of kSide x kSide has what in shared memory.
template <int kSide>
struct Layout {
  static constexpr int kDepth = 128 / kSide;       // rows y staged at once
  static constexpr int kRuns = kSide * kSide + 1;  // odd, so that a warp's threads meet in no bank

  int rows, width, tiles;  // tile rows; columns with those that fill the last tile; tiles

  __host__ __device__ explicit Layout(int64_t k)
      : rows(int(k + kSide - 1) / kSide), width(rows * kSide), tiles(tiles_of(rows)) {}

  // [kDepth][width] of y, later [kSide][width] of L; [width] of the right side, of the least pivots;
  // [kDepth] of what y is multiplied by in the matrix, on the right side; [tiles][kRuns] of runs' sums.
  __host__ __device__ int floats() const { return (kDepth + 2) * width + 2 * kDepth + kRuns * tiles; }
  int threads() const { return threads_for(tiles > width ? tiles : width); }
};

template <int kSide>
class Cholesky {
 public:
  __device__ Cholesky(const Problem& of, float* memory)
      : of_(of),
        at_(of.k),
        panel_(memory),
        side_(panel_ + at_.kDepth * at_.width),
        least_(side_ + at_.width),
        of_matrix_(least_ + at_.width),
        of_side_(of_matrix_ + at_.kDepth),
        runs_(of_side_ + at_.kDepth) {
    // Tiles lie column by column, so that those a column less has lost are the first warps'.
    int left = thread_;
    for (; column_ < at_.rows && left >= at_.rows - column_; ++column_) left -= at_.rows - column_;
    row_ = column_ + left;
  }

  __device__ __forceinline__ void solve(int64_t row, float* x, const float* gram, bool vectors) {
    const int64_t begin = of_.csr.indptr[row], end = of_.csr.indptr[row + 1];
    const int k = int(of_.k);
    const bool lacking =
        !gram && !(of_.options.reg > 0.0f) && end - begin < k;  // whatever rounding makes of it
    if (begin == end || lacking) {
      if (thread_ < k) x[thread_] = begin == end ? 0.0f : NAN;
      return;
    }
    const float reg = of_.reg(end - begin);
    add_entries(begin, end, vectors);
    start(gram, reg);
    factorise();
    substitute_back();
    if (thread_ < k) x[thread_] = side_[thread_];
  }

 private:
  __device__ __forceinline__ bool owns() const { return column_ < at_.rows; }
  __device__ __forceinline__ bool on_diagonal(int at) const { return row_ == at && column_ == at; }

  // Rows y of the entries from `begin` on, zeros beyond `count` of them and for columns that are none.
  template <int kWidth>
  __device__ __forceinline__ void stage(int64_t begin, int count) {
    const int across = at_.width / kWidth;
    for (int n = thread_; n < at_.kDepth * across; n += blockDim.x) {
      const int entry = n / across, from = n % across * kWidth;
      const float* const row = entry < count && from < of_.k ? of_.row_of(begin + entry) : nullptr;
      store(panel_ + entry * at_.width + from, row ? load<kWidth>(row + from) : Vec<float, kWidth>{});
    }
  }

  __device__ __forceinline__ void add_entries(int64_t begin, int64_t end, bool vectors) {
    float own_side = 0.0f, side_of_runs = 0.0f;
    int added = 0;
    bool runs = false;
    for (int64_t first = begin; first < end; first += at_.kDepth) {
      const int count = int(min(int64_t(at_.kDepth), end - first));
      __syncthreads();  // the rows before these, or another row's solution, have been read
      vectors ? stage<4>(first, count) : stage<1>(first, count);
      if (thread_ < at_.kDepth) {
        of_matrix_[thread_] = thread_ < count ? of_.of_matrix(first + thread_) : 0.0f;
        of_side_[thread_] = thread_ < count ? of_.of_side(first + thread_) : 0.0f;
      }
      __syncthreads();
      if (thread_ < at_.width) {
        float some[4] = {};  // four sums, which do not wait for each other and round less than one
        for (int entry = 0; entry < at_.kDepth; entry += 4)  // zeros from `count` on
#pragma unroll
          for (int n = 0; n < 4; ++n)
            some[n] += of_side_[entry + n] * panel_[(entry + n) * at_.width + thread_];
        own_side += (some[0] + some[1]) + (some[2] + some[3]);
      }
      if (owns())
        for (int entry = 0; entry < count; ++entry) {
          const float* const y = panel_ + entry * at_.width;
          const Part down = part(y, row_), across = part(y, column_);
          add_product(down, across, of_matrix_[entry]);
        }
      added += at_.kDepth;
      if (added == kApart && first + at_.kDepth < end) {
        added = 0;
        side_of_runs += own_side;
        own_side = 0.0f;
        each([&](int r, int c, float& sum) {
          float& run = runs_[thread_ * at_.kRuns + r * kSide + c];
          run = runs ? run + sum : sum;
          sum = 0.0f;
        });
        runs = true;
      }
    }
    if (runs) each([&](int r, int c, float& sum) { sum += runs_[thread_ * at_.kRuns + r * kSide + c]; });
    if (thread_ < at_.width) side_[thread_] = side_of_runs + own_side;
  }

  // Adds what is not the entries', and takes ones for the diagonal that fills the last tile.
  __device__ __forceinline__ void start(const float* gram, float reg) {
    // Rounding alone leaves of a pivot that ought to be 0 about this of the element it began as.
    const float least = 2.0f * sqrtf(float(of_.k)) * 1.1920929e-7f;
    const int k = int(of_.k), first = row_ * kSide;
    if (gram && owns()) {
      const float* const of_tile = gram + first * k + column_ * kSide;
#pragma unroll
      for (int r = 0; r < kSide; ++r)
        if (first + r < k)  // and so are the columns up to the diagonal
#pragma unroll
          for (int c = 0; c < kSide; ++c)
            if (column_ * kSide + c < k) sums_[r][c] += of_tile[r * k + c];
    }
    if (!owns() || row_ != column_) return;
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      sums_[r][r] = first + r < k ? sums_[r][r] + reg : 1.0f;
      least_[first + r] = sums_[r][r] * least;
    }
  }

  // L in place of the tiles, with 1 / L on the diagonal, and L^-1 of the right side in its place. A tile
  // column at a time: its first tile is one thread's, the others divide by it, and all later ones lose their
  // product. A pivot that is nothing but rounding becomes NaN, which reaches all of x.
  __device__ __forceinline__ void factorise() {
    for (int p = 0; p < at_.rows; ++p) {
      __syncthreads();  // the right side is there, and the column before this one has been read
      if (on_diagonal(p)) factorise_own();
      __syncthreads();
      if (column_ == p && row_ > p) divide_own();
      __syncthreads();
      if (column_ > p && owns()) {
#pragma unroll 2
        for (int c = 0; c < kSide; ++c) {
          const float* const column = panel_ + c * at_.width;
          const Part down = part(column, row_), across = part(column, column_);
          add_product(down, across, -1.0f);
        }
      }
    }
  }

  __device__ __forceinline__ void factorise_own() {
    const int first = row_ * kSide;
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const float pivot = sums_[c][c];
      const float inverse = pivot > least_[first + c] && pivot < INFINITY ? 1.0f / sqrtf(pivot) : NAN;
      sums_[c][c] = inverse;
      float z = side_[first + c];
#pragma unroll
      for (int d = 0; d < c; ++d) z -= sums_[c][d] * side_[first + d];
      side_[first + c] = z * inverse;
#pragma unroll
      for (int r = c + 1; r < kSide; ++r) sums_[r][c] *= inverse;
#pragma unroll
      for (int d = c + 1; d < kSide; ++d)
#pragma unroll
        for (int r = d; r < kSide; ++r) sums_[r][d] -= sums_[r][c] * sums_[d][c];
#pragma unroll
      for (int r = c; r < kSide; ++r) panel_[c * at_.width + first + r] = sums_[r][c];
    }
  }

  __device__ __forceinline__ void divide_own() {
    const int above = column_ * kSide, first = row_ * kSide;
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
#pragma unroll
      for (int d = 0; d < c; ++d) {
        const float factor = panel_[d * at_.width + above + c];
#pragma unroll
        for (int r = 0; r < kSide; ++r) sums_[r][c] -= sums_[r][d] * factor;
      }
      const float inverse = panel_[c * at_.width + above + c], z = side_[above + c];
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        sums_[r][c] *= inverse;
        panel_[c * at_.width + first + r] = sums_[r][c];
        side_[first + r] -= sums_[r][c] * z;
      }
    }
  }

  // x in place of L^-1 of the right side: a tile row's part of x is one thread's, and the row's other tiles
  // take it off what stands before it.
  __device__ __forceinline__ void substitute_back() {
    for (int p = at_.rows - 1; p >= 0; --p) {
      if (on_diagonal(p)) {
#pragma unroll
        for (int c = kSide - 1; c >= 0; --c) {
          float x = side_[p * kSide + c];
#pragma unroll
          for (int r = c + 1; r < kSide; ++r) x -= sums_[r][c] * side_[p * kSide + r];
          side_[p * kSide + c] = x * sums_[c][c];
        }
      }
      __syncthreads();
      if (row_ == p && column_ < p) {
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          float rest = side_[column_ * kSide + c];
#pragma unroll
          for (int r = 0; r < kSide; ++r) rest -= sums_[r][c] * side_[p * kSide + r];
          side_[column_ * kSide + c] = rest;
        }
      }
      __syncthreads();
    }
  }

  struct Part {
    Vec<float, 4> of[kSide / 4];
    __device__ __forceinline__ float at(int n) const { return of[n / 4].at[n % 4]; }
  };
  __device__ __forceinline__ static Part part(const float* row, int tile) {
    Part part;
#pragma unroll
    for (int n = 0; n < kSide / 4; ++n) part.of[n] = load<4>(row + tile * kSide + 4 * n);
    return part;
  }
  __device__ __forceinline__ void add_product(const Part& down, const Part& across, float factor) {
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      const float left = factor * down.at(r);
#pragma unroll
      for (int c = 0; c < kSide; ++c) sums_[r][c] += left * across.at(c);
    }
  }
  // Calls body(r, c, sum) for what this thread's tile has.
  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    if (!owns()) return;
#pragma unroll
    for (int r = 0; r < kSide; ++r)
#pragma unroll
      for (int c = 0; c < kSide; ++c) body(r, c, sums_[r][c]);
  }

  const Problem& of_;
  const Layout<kSide> at_;
  float *const panel_, *const side_, *const least_, *const of_matrix_, *const of_side_, *const runs_;
  const int thread_ = threadIdx.x;
  int row_, column_ = 0;
  float sums_[kSide][kSide] = {};
};

template <int kSide>
__global__ void __launch_bounds__(most_threads(kSide), solving_blocks(kSide))
    mf_als_cholesky_kernel(float* factors, const Problem of, const float* gram, bool vectors) {
  DYNAMIC_SHARED(memory);
  for (int64_t row = blockIdx.x; row < of.csr.rows; row += gridDim.x)
    Cholesky<kSide>(of, reinterpret_cast<float*>(memory)).solve(row, factors + row * of.k, gram, vectors);
}

// ---- Conjugate gradient

constexpr int kMostStepped = 512;                  // factors
constexpr int kMostValues = kMostStepped / kWarp;  // of a row in a lane

// Of a multiprocessor, at least, by the values of a lane: left to itself, ptxas aims at more and spills.
constexpr int blocks_of(int values) { return values <= 4 ? 3 : values <= 8 ? 2 : 1; }

// The warps that work on a row: one alone, or all of a block.
struct Team {
  int rank, warps;
  float* sums;  // [warps][k], shared

  // Adds up what the warps have, and gives it to each.
  template <int kValues, int kWidth>
  __device__ __forceinline__ void add(Values<kValues, kWidth>& part, int64_t k, int group) const {
    if (warps == 1) return;
    if (group == 0) part.store(sums + rank * k, k);
    __syncthreads();
    part.load(sums, k);
#pragma unroll 1  // unrolled, its loads would take registers
    for (int other = 1; other < warps; ++other) {
      Values<kValues, kWidth> more = {};
      more.load(sums + other * k, k);
#pragma unroll
      for (int n = 0; n < kValues; ++n) part.at[n] += more.at[n];
    }
    __syncthreads();  // the next sums take the place
  }
};

template <int kValues, int kWidth>
class ConjugateGradient {
 public:
  __device__ ConjugateGradient(const Problem& of, const float* gram) : of_(of), gram_(gram) {}

  __device__ __forceinline__ void solve(int64_t row, float* to, const Team& team) const {
    const int64_t begin = of_.csr.indptr[row], end = of_.csr.indptr[row + 1];
    const float reg = of_.reg(end - begin);
    Row x = {};
    if (begin < end) {
      x.load(to, of_.k);
      Row r = product<true>(x, reg, begin, end, team), p = r;
      float left = dot(r, r), steepest = 0.0f;
      const float least = fmaxf(kStepEpsilon * kStepEpsilon * left, kStepLost);
      for (int64_t step = 0; step < of_.options.steps; ++step) {
        const Row q = product<false>(p, reg, begin, end, team);
        const float curvature = dot(p, q), slope = curvature / dot(p, p);
        steepest = fmaxf(steepest, slope);
        // For all warps at once, and a NaN goes on.
        if (slope <= kStepEpsilon * steepest || left < least) break;
        const float length = left / curvature;
#pragma unroll
        for (int n = 0; n < kValues; ++n) {
          x.at[n] += length * p.at[n];
          r.at[n] -= length * q.at[n];
        }
        const float after = dot(r, r), share = after / left;
#pragma unroll
        for (int n = 0; n < kValues; ++n) p.at[n] = r.at[n] + share * p.at[n];
        left = after;
      }
    }
    __syncwarp();  // every group has read the row
    if (group_ == 0 && team.rank == 0) x.store(to, of_.k);
  }

 private:
  using Row = Values<kValues, kWidth>;

  // The matrix by p; kRest: the right side minus that.
  template <bool kRest>
  __device__ __forceinline__ Row product(const Row& p, float reg, int64_t begin, int64_t end,
                                         const Team& team) const {
    constexpr float kSign = kRest ? -1.0f : 1.0f;
    Row sum = {};
    const int64_t step = team.warps * groups_;
    for (int64_t run = begin + team.rank * groups_; run < end; run += kRun * step) {
      Row part = {};
      add_entries<kRest>(part, p, run, min(end, run + kRun * step), end, step);
#pragma unroll
      for (int n = 0; n < kValues; ++n) sum.at[n] += part.at[n];
    }
    if (gram_) add_gram(sum, p, kSign, team);
    sum.add_groups();
    team.add(sum, of_.k, group_);
#pragma unroll
    for (int n = 0; n < kValues; ++n) sum.at[n] += kSign * reg * p.at[n];
    return sum;
  }

  template <bool kRest>
  __device__ __forceinline__ void add_entries(Row& sum, const Row& p, int64_t begin, int64_t stop,
                                              int64_t end, int64_t step) const {
    constexpr int kInFlight = kValues <= 4 ? 4 : kValues <= 8 ? 2 : 1;  // entries, as far as registers go
    // All lanes of a warp go round as often, as they meet in the shuffles.
#pragma unroll kInFlight
    for (; begin < stop; begin += step) {
      const int64_t entry = begin + group_;
      const float* const row = entry < end ? of_.row_of(entry) : nullptr;
      Row y = {};
      if (row) y.load(row, of_.k);
      float scale = dot(y, p);
      if (row) scale *= of_.of_matrix(entry);
      if (kRest) scale = (row ? of_.of_side(entry) : 0.0f) - scale;
#pragma unroll
      for (int n = 0; n < kValues; ++n) sum.at[n] += scale * y.at[n];
    }
  }

  // Every n-th row of Y'Y is a group's; what p has for it comes from the lane that has it.
  __device__ __forceinline__ void add_gram(Row& sum, const Row& p, float sign, const Team& team) const {
    const int lanes = blockDim.x;
#pragma unroll
    for (int n = 0; n < kValues; n += kWidth) {
      Row part = {};
      for (int first = team.rank * groups_; first < lanes; first += team.warps * groups_) {
        const int lane = first + group_;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float factor = sign * __shfl_sync(kAllLanes, p.at[n + e], lane % lanes, lanes);
          const int64_t row = n * kWarp + lane * kWidth + e;
          if (lane >= lanes || row >= of_.k) continue;
          Row of_row = {};
          of_row.load(gram_ + row * of_.k, of_.k);
#pragma unroll
          for (int i = 0; i < kValues; ++i) part.at[i] += factor * of_row.at[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) sum.at[i] += part.at[i];
    }
  }

  const Problem& of_;
  const float* const gram_;
  const int groups_ = kWarp / blockDim.x, group_ = threadIdx.y % groups_;  // of a warp
};

template <int kValues, int kWidth>
__global__ void __launch_bounds__(kThreads, blocks_of(kValues))
    mf_als_cg_kernel(float* factors, const Problem of, const float* gram, int rows_of_block) {
  DYNAMIC_SHARED(memory);
  const int warp = (threadIdx.y * blockDim.x + threadIdx.x) / kWarp;
  const int64_t first = int64_t(blockIdx.x) * rows_of_block;
  const int count = int(min(int64_t(rows_of_block), of.csr.rows - first));
  const int64_t* const begins = of.csr.indptr + first;
  const ConjugateGradient<kValues, kWidth> rows(of, gram);
  for (int of_all = 0; of_all < 2; ++of_all) {  // rows of few entries, and then those of many
    const Team team = {of_all ? warp : 0, of_all ? kWarps : 1, reinterpret_cast<float*>(memory)};
    for (int n = of_all ? 0 : warp; n < count; n += of_all ? 1 : kWarps)
      if ((begins[n + 1] - begins[n] > kLong) == bool(of_all))
        rows.solve(first + n, factors + (first + n) * of.k, team);
  }
}

// Calls body(kernel, vectors of a row) for as few values of a lane as rows of k factors need.
template <int kWidth, int kValues = kWidth, class Body>
void with_values(int64_t k, Body body) {
  if constexpr (kValues < kMostValues)
    if (k > kValues * kWarp) return with_values<kWidth, 2 * kValues>(k, body);
  body(mf_als_cg_kernel<kValues, kWidth>, k / kWidth);
}

}  // namespace

void mf_als_update(float* factors, const float* other_factors, const Csr& csr, const float* values,
                   const float* weight, const float* gram, int64_t k, const MfAlsOptions& options, int device,
                   void* stream) {
  const int64_t most = options.steps ? kMostStepped : kMostSolved;
  if (k > most)
    throw std::invalid_argument("mf_als_update: K must be at most " + std::to_string(most) + ", got " +
                                std::to_string(k));
  if (csr.rows == 0 || k == 0) return;
  const DeviceGuard guard(device);
  const Problem problem = {{other_factors, values, csr, k}, weight, options};
  constexpr int kWide = kVectorBytes / sizeof(float);
  const bool vectors = k % kWide == 0 && aligned_for_vectors(factors, other_factors, gram);
  const auto solve = [&](auto* kernel, const auto& layout) {
    const unsigned blocks = unsigned(csr.rows < (1 << 20) ? csr.rows : 1 << 20);
    launch({blocks, unsigned(layout.threads()), layout.floats() * sizeof(float), cudaStream_t(stream)},
           kernel, factors, problem, gram, vectors);
  };
  const auto step = [&](auto* kernel, int64_t of_row) {
    const int lanes = lanes_of(of_row), rows = rows_of_block(csr.rows);
    launch({unsigned((csr.rows + rows - 1) / rows), dim3(lanes, kThreads / lanes),
            size_t(kWarps * k) * sizeof(float), cudaStream_t(stream)},
           kernel, factors, problem, gram, rows);
  };
  if (options.steps)
    vectors ? with_values<kWide>(k, step) : with_values<1>(k, step);
  else if (k <= kSmall)
    solve(mf_als_cholesky_kernel<4>, Layout<4>(k));
  else
    solve(mf_als_cholesky_kernel<8>, Layout<8>(k));
}

}  // namespace lspm::cuda
