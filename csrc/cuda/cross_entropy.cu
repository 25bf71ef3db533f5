// Cross entropy with an online softmax (Milakov and Gimelshein 2018).
//
// A block owns a row, or four where rows are short. Each thread reads its share of the row once, in aligned
// vectors of 16 bytes of which a row of odd length may fill but a part, and keeps sums relative to the
// largest logit it has seen; shuffles and shared memory bring them together in a fixed order. One block then
// adds up the losses of rows. The backward reads a row once and writes it once. Bytes per logit of s bytes:
// forward s, backward 2 s; with probabilities s more.
#include "../cross_entropy.h"
#include "common.cuh"

namespace lspm::cuda {
namespace {

constexpr int kBlock = 128, kMostThreads = 512;  // short rows share a block of kBlock
constexpr int kSumThreads = 512;

// Targets and weights as the kernels read them; T is the type of logits and of probabilities.
template <class T>
struct Target {
  const int64_t* classes;  // or null
  const T* probabilities;  // or null
  const float* weight;     // or null
  int64_t count, ignore_index;
  float smoothing;

  __device__ bool ignored(int64_t row) const { return classes && classes[row] == ignore_index; }
  __device__ bool known(int64_t row) const {
    return !classes || (classes[row] >= 0 && classes[row] < count && classes[row] != ignore_index);
  }
  // The q of a class, but for what the target's class alone has of it.
  __device__ float spread(int64_t row, int64_t c) const {
    float q = smoothing / count;
    if (probabilities) q += (1.0f - smoothing) * to_float(probabilities[row * count + c]);
    return weight ? q * weight[c] : q;
  }
  __device__ float weight_of(int64_t c) const { return weight ? weight[c] : 1.0f; }
};

// What some logits of a row sum up to, relative to the largest of them where that is finite.
struct Sums {
  float largest, exps, products, q;

  __device__ float shift() const { return largest == -INFINITY ? 0.0f : largest; }
  // The same, relative to a logit that is as large.
  __device__ void raise(float to) {
    const float before = shift(), past = largest;
    largest = to;
    exps *= __expf(past - shift());
    products += q * (before - shift());
  }
  __device__ void add(Sums other) {
    const float most = fmaxf(largest, other.largest);
    raise(most);
    other.raise(most);
    exps += other.exps;
    products += other.products;
    q += other.q;
  }
};

// The sums over the threads of equal threadIdx.y, given to each.
__device__ __forceinline__ Sums row_sums(Sums sums) {
  const auto over_warp = [](Sums s) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      Sums other;
      other.largest = __shfl_xor_sync(kAllLanes, s.largest, distance);
      other.exps = __shfl_xor_sync(kAllLanes, s.exps, distance);
      other.products = __shfl_xor_sync(kAllLanes, s.products, distance);
      other.q = __shfl_xor_sync(kAllLanes, s.q, distance);
      s.add(other);
    }
    return s;
  };
  sums = over_warp(sums);
  SHARED(Sums, of_warps, [32]);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp, first = threadIdx.y * warps;
  if (lane == 0) of_warps[first + threadIdx.x / kWarp] = sums;
  __syncthreads();
  Sums total = of_warps[first];
  for (int warp = 1; warp < warps; ++warp) total.add(of_warps[first + warp]);
  return total;
}

// Where the first aligned vector that holds something of a row begins: with its class 0 or before.
template <int kWidth, class T>
__device__ __forceinline__ int first_vector(const T* row) {
  return -int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kWidth);
}
__device__ __forceinline__ bool within(int64_t c, int64_t classes) { return uint64_t(c) < uint64_t(classes); }

// Classes c to c + kWidth of a row; `outside` stands for those that it has not.
template <int kWidth, class T>
__device__ __forceinline__ Vec<T, kWidth> load_within(const T* row, int64_t c, int64_t classes, T outside) {
  if (c >= 0 && c + kWidth <= classes) return load<kWidth>(row + c);
  Vec<T, kWidth> vector;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) vector.at[e] = within(c + e, classes) ? row[c + e] : outside;
  return vector;
}
template <int kWidth, class T>
__device__ __forceinline__ void store_within(T* row, int64_t c, int64_t classes, Vec<T, kWidth> vector) {
  if (c >= 0 && c + kWidth <= classes) return store(row + c, vector);
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    if (within(c + e, classes)) row[c + e] = vector.at[e];
}

template <class T, int kWidth, bool kSpread>
__global__ void __launch_bounds__(kMostThreads)
    cross_entropy_forward_kernel(const T* __restrict__ logits, Target<T> target, T* loss, float* statistics,
                                 float* row_losses, int64_t rows, bool mean) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, classes = target.count;
  const bool read = row < rows && target.known(row);  // the others still take part in the sums
  const T* const x = logits + row * classes;
  Sums sums = {-INFINITY, 0.0f, 0.0f, 0.0f};
  const int64_t first = first_vector<kWidth>(x) + int(threadIdx.x) * kWidth;
  for (int64_t c = first; read && c < classes; c += int64_t(blockDim.x) * kWidth) {
    const Vec<T, kWidth> vector = load_within<kWidth>(x, c, classes, from_float<T>(-INFINITY));
    float most = sums.largest;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) most = fmaxf(most, to_float(vector.at[e]));
    sums.raise(most);
    const float shift = sums.shift();
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float value = to_float(vector.at[e]) - shift;
      sums.exps += __expf(value);
      if (kSpread && within(c + e, classes)) {
        const float part = target.spread(row, c + e);
        sums.products += part * value;
        sums.q += part;
      }
    }
  }
  sums = row_sums(sums);
  if (threadIdx.x > 0 || row >= rows) return;
  const float log = logf(sums.exps);
  float total = kSpread ? log * sums.q - sums.products : 0.0f, weight = 1.0f, q = sums.q;
  if (target.classes) {
    if (read) {
      const int64_t wanted = target.classes[row];
      weight = target.weight_of(wanted);
      const float hit = (1.0f - target.smoothing) * weight;
      total += (log - (to_float(x[wanted]) - sums.largest)) * hit;
      q += hit;
    } else {
      total = weight = q = target.ignored(row) ? 0.0f : NAN;
    }
  }
  statistics[row] = sums.largest;
  statistics[rows + row] = log;
  statistics[2 * rows + row] = q;
  if (loss) loss[row] = from_float<T>(total);
  row_losses[row] = total;
  row_losses[rows + row] = weight;
  if (row == 0 && !mean) statistics[3 * rows] = 1.0f;
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_sum_kernel(const float* __restrict__ row_losses, T* loss, float* statistics, int64_t rows,
                             bool mean) {
  float2 sums = {0.0f, 0.0f};
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) {
    sums.x += row_losses[row];
    sums.y += row_losses[rows + row];
  }
  sums = row_sum(sums);
  if (threadIdx.x > 0) return;
  if (mean) statistics[3 * rows] = sums.y;
  *loss = from_float<T>(mean ? sums.x / sums.y : sums.x);
}

template <class T, int kWidth, bool kSpread>
__global__ void __launch_bounds__(kMostThreads)
    cross_entropy_backward_kernel(const T* __restrict__ dloss, const T* __restrict__ logits, Target<T> target,
                                  const float* __restrict__ statistics, T* dlogits, int64_t rows,
                                  bool reduced) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, classes = target.count;
  if (row >= rows) return;
  const bool read = target.known(row);
  const float largest = statistics[row], log = statistics[rows + row], q = statistics[2 * rows + row];
  const float scale = to_float(dloss[reduced ? 0 : row]) / statistics[3 * rows];
  const int64_t wanted = target.classes && read ? target.classes[row] : -1;
  const float hit = wanted < 0 ? 0.0f : scale * ((1.0f - target.smoothing) * target.weight_of(wanted));
  const T* const x = logits + row * classes;
  const int64_t first = first_vector<kWidth>(x) + int(threadIdx.x) * kWidth;
  for (int64_t c = first; c < classes; c += int64_t(blockDim.x) * kWidth) {
    Vec<T, kWidth> vector = {};
    if (read) vector = load_within<kWidth>(x, c, classes, T{});
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      float gradient = q;  // 0 where the row is ignored, NaN where its class is none
      if (read) {
        gradient = __expf((to_float(vector.at[e]) - largest) - log) * (scale * q);
        if (kSpread && within(c + e, classes)) gradient -= target.spread(row, c + e) * scale;
        if (c + e == wanted) gradient -= hit;
      }
      vector.at[e] = from_float<T>(gradient);
    }
    store_within(dlogits + row * classes, c, classes, vector);
  }
}

// Threads of a row, in whole warps, and how many rows share a block.
dim3 block_shape(int64_t vectors) {
  constexpr int64_t kVectors = 4;  // of a thread, at least, before a row takes more threads
  const int64_t warps = (vectors + kWarp * kVectors - 1) / (kWarp * kVectors);
  const int threads = int(warps * kWarp < kMostThreads ? (warps > 0 ? warps * kWarp : kWarp) : kMostThreads);
  return dim3(threads, threads < kBlock ? kBlock / threads : 1);
}

template <class T>
Target<T> target_of(const void* target, const float* weight, const CrossEntropyShape& s) {
  return {s.probabilities ? nullptr : static_cast<const int64_t*>(target),
          s.probabilities ? static_cast<const T*>(target) : nullptr,
          weight,
          s.classes,
          s.ignore_index,
          s.smoothing};
}

}  // namespace

void cross_entropy_forward(const void* logits, const void* target, const float* weight, void* loss,
                           float* statistics, float* row_losses, const CrossEntropyShape& s, int device,
                           void* stream) {
  with_types("cross_entropy_forward", s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool spread = s.probabilities || s.smoothing > 0, mean = s.reduction == Reduction::mean;
    auto* kernel = spread ? cross_entropy_forward_kernel<T, kWidth, true>
                          : cross_entropy_forward_kernel<T, kWidth, false>;
    const DeviceGuard guard(device);
    const dim3 block = block_shape(s.classes / kWidth);
    const bool reduced = s.reduction != Reduction::none;
    if (s.rows > 0)
      launch({unsigned((s.rows + block.y - 1) / block.y), block, 0, cudaStream_t(stream)}, kernel,
             static_cast<const T*>(logits), target_of<T>(target, weight, s),
             reduced ? nullptr : static_cast<T*>(loss), statistics, row_losses, s.rows, mean);
    if (reduced)
      launch({1, kSumThreads, 0, cudaStream_t(stream)}, cross_entropy_sum_kernel<T>, row_losses,
             static_cast<T*>(loss), statistics, s.rows, mean);
  });
}

void cross_entropy_backward(const void* dloss, const void* logits, const void* target, const float* weight,
                            const float* statistics, void* dlogits, const CrossEntropyShape& s, int device,
                            void* stream) {
  with_types("cross_entropy_backward", s.dtype, "dtype", s.dtype, [&](auto types) {
    using T = typename decltype(types)::Data;
    if (s.rows == 0 || s.classes == 0) return;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    const bool wide = (address(logits) - address(dlogits)) % kVectorBytes == 0;  // alike in every row
    auto* kernel =
        wide ? cross_entropy_backward_kernel<T, kWidth, false> : cross_entropy_backward_kernel<T, 1, false>;
    if (s.probabilities || s.smoothing > 0)
      kernel =
          wide ? cross_entropy_backward_kernel<T, kWidth, true> : cross_entropy_backward_kernel<T, 1, true>;
    const DeviceGuard guard(device);
    const dim3 block = block_shape(s.classes / (wide ? kWidth : 1));
    launch({unsigned((s.rows + block.y - 1) / block.y), block, 0, cudaStream_t(stream)}, kernel,
           static_cast<const T*>(dloss), static_cast<const T*>(logits), target_of<T>(target, weight, s),
           statistics, static_cast<T*>(dlogits), s.rows, s.reduction != Reduction::none);
  });
}

}  // namespace lspm::cuda
