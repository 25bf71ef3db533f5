// Small kernels that pin down what we believe the GPU does, one feature each, and kernels with one bug each
// that the emulator must find. On the day a GPU is there the first kind runs on it before anything else.
#include "entry.h"
#include "ptx.cuh"

namespace {

using namespace lspm::cuda;

// One warp, one mma: element i of lane l of A, B and D is memory[l][i], so the caller sees the layouts.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int l = threadIdx.x;
  const uint32_t a_lane[4] = {a[l * 4], a[l * 4 + 1], a[l * 4 + 2], a[l * 4 + 3]};
  const uint32_t b_lane[2] = {b[l * 2], b[l * 2 + 1]};
  float d_lane[4] = {d[l * 4], d[l * 4 + 1], d[l * 4 + 2], d[l * 4 + 3]};
  if constexpr (sizeof(T) == 2)
    ptx::mma_16816<T>(d_lane, a_lane, b_lane);
  else
    ptx::mma_1688_tf32(d_lane, a_lane, b_lane);
  for (int i = 0; i < 4; ++i) d[l * 4 + i] = d_lane[i];
}

template <bool kTranspose>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {  // in: 32 rows of 8
  SHARED(uint4, rows, [32]);
  rows[threadIdx.x] = reinterpret_cast<const uint4*>(in)[threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4<kTranspose>(r, &rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

__global__ void cp_async_kernel(const uint4* in, uint4* out) {  // two groups; lanes from 20 on get zeros
  SHARED(uint4, staged, [64]);
  ptx::cp_async16(&staged[threadIdx.x], in + threadIdx.x, threadIdx.x < 20);
  ptx::cp_async_commit();
  ptx::cp_async16(&staged[32 + threadIdx.x], in + 32 + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  out[threadIdx.x] = staged[threadIdx.x];
  ptx::cp_async_wait<0>();
  out[32 + threadIdx.x] = staged[32 + threadIdx.x];
}

__global__ void prefetch_kernel(const int* in, int* out) {
  ptx::prefetch(in + threadIdx.x);
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void ex2_kernel(const float* in, float* out) { out[threadIdx.x] = ptx::ex2(in[threadIdx.x]); }
template <class T>
__global__ void pack_kernel(const float* in, uint32_t* out) {
  out[threadIdx.x] = ptx::pack<T>(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]);
}
__global__ void tf32_kernel(const float* in, uint32_t* out) {
  out[threadIdx.x] = ptx::cvt_tf32(in[threadIdx.x]);
}

__global__ void __launch_bounds__(32) bounds_kernel(int* out) { out[threadIdx.x] = 1; }

__global__ void dynamic_shared_kernel(int* out, int count) {  // reversed through shared memory
  DYNAMIC_SHARED(raw);
  int* values = reinterpret_cast<int*>(raw);
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = values[count - 1 - i];
}

__global__ void warp_kernel(const int* in, int* out) {  // 64 threads, 10 results each
  const int t = threadIdx.x, v = in[t];
  int r[10] = {__shfl_sync(kAllLanes, v, 5),         __shfl_up_sync(kAllLanes, v, 3),
               __shfl_down_sync(kAllLanes, v, 4, 8), __shfl_xor_sync(kAllLanes, v, 9, 16),
               (int)__ballot_sync(kAllLanes, v & 1), __any_sync(kAllLanes, v == in[40]),
               __all_sync(kAllLanes, v >= 0),        (int)__reduce_add_sync(kAllLanes, v),
               __shfl_sync(kAllLanes, v, t + 1, 4),  0};
  if (t % 32 < 8)
    r[9] = __shfl_xor_sync(0xFFu, v, 1);
  else
    r[9] = (int)__ballot_sync(0xFFFFFF00u, v & 2);
  for (int i = 0; i < 10; ++i) out[t * 10 + i] = r[i];
}

__global__ void atomic_kernel(const float* x, int n, float* sum, int* histogram, unsigned* largest,
                              unsigned long long* count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(sum, x[i]);
    atomicAdd(&histogram[(int)(x[i] * 8)], 1);
    atomicMax(largest, (unsigned)i);
    atomicAdd(count, 3ull);
  }
}

template <class T>
__global__ void convert_kernel(const float* in, T* out, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = from_float<T>(in[i]);
  back[i] = to_float(out[i]);
}

// The numbers are those of BUGS in test_emulator.py.
__global__ void bug_kernel(int* out, const int* in, int bug) {  // 64 threads
  SHARED(int, s, [64]);
  const int t = threadIdx.x, l = t % 32;
  s[t] = -1;
  if (bug != 13 && bug != 16) __syncthreads();
  switch (bug) {
    case 0:  // none
      s[t] = t;
      __syncthreads();
      out[t] = s[63 - t];
      break;
    case 1:  // no __syncwarp
      s[t] = t;
      out[t] = s[t ^ 1];
      break;
    case 2:  // none
      s[t] = t;
      __syncwarp();
      out[t] = s[t ^ 1];
      break;
    case 3:  // __syncwarp where __syncthreads is due
      s[t] = t;
      __syncwarp();
      out[t] = s[63 - t];
      break;
    case 4:  // a write after the others' reads
      s[t] = t;
      __syncthreads();
      out[t] = s[63 - t];
      s[t] = 0;
      break;
    case 5:  // two writes
      s[0] = t;
      __syncthreads();
      out[t] = s[0];
      break;
    case 6:  // shuffles order no memory
      s[t] = t;
      (void)__shfl_xor_sync(kAllLanes, t, 1);
      out[t] = s[t ^ 1];
      break;
    case 7:  // none
      if (l < 16)
        __syncwarp(0xFFFF);
      else
        __syncwarp(0xFFFF0000);
      out[t] = 1;
      break;
    case 8:  // one warp operation at two places
      if (l < 16)
        out[t] = __shfl_xor_sync(kAllLanes, t, 1);
      else
        out[t] = __shfl_xor_sync(kAllLanes, t, 2);
      break;
    case 9:  // a thread that exits
      if (t == 0) return;
      __syncthreads();
      out[t] = 1;
      break;
    case 10:  // a deadlock
      if (t < 32)
        __syncthreads();
      else if (l < 31)
        __syncwarp();
      else
        __syncthreads();
      out[t] = 1;
      break;
    case 11:  // reads past the end
      out[t] = in[t + 1];
      break;
    case 12:  // writes before the start
      out[t - 1] = 1;
      break;
    case 13: {  // an array of which element 0 is never written
      SHARED(int, part, [64]);
      if (t > 0) part[t] = 1;
      __syncthreads();
      out[t] = part[t];
      break;
    }
    case 14:  // two blocks write one element
      if (t == 0) out[0] = blockIdx.x;
      break;
    case 15:  // reads an output
      out[t] = out[t] + 1;
      break;
    case 16: {  // an array that is never written
      SHARED(int, never, [64]);
      out[t] = never[t & 1 ? 3 : 5];
      break;
    }
    case 17:  // an 8-byte read at 4
      out[t] = *reinterpret_cast<const long long*>(in + 1) != 0;
      break;
    case 18:  // an atomic and a plain write
      atomicAdd(&out[0], 1);
      if (t == 5) out[0] = 7;
      break;
    case 19:  // past a shared array
      s[64 + l] = 1;
      out[t] = 0;
      break;
    case 20: {  // a large read across the end
      struct Large {
        int v[12];
      } large = *reinterpret_cast<const Large*>(in + 56);
      out[t] = large.v[l % 12];
      break;
    }
    case 21: {  // past a local array: asan only
      int local[4];
      for (int i = 0; i < 4; ++i) local[in[i] + i + 1] = i;
      out[t] = local[l & 3];
      break;
    }
    case 22:  // shifts too far: UBSan only
      out[t] = 1 << (in[63] + 40);
      break;
    case 23:  // none: one reads, another reads and then writes
    case 24:  // the same in one interval
      s[t] = t;
      __syncwarp();
      if (l % 2) out[t] = s[t - 1];
      if (bug == 23) __syncwarp();
      if (l % 2 == 0) s[t] = s[t] + 1;
      break;
  }
}

}  // namespace

extern "C" {

const char* mma_test(const uint32_t* a, const uint32_t* b, float* d, int64_t kind) {
  auto* kernel = kind == 0 ? mma_kernel<bf16> : kind == 1 ? mma_kernel<f16> : mma_kernel<float>;
  return message_of([&] { launch({1, 32, 0, nullptr}, kernel, a, b, d); });
}
const char* ldmatrix_test(const uint16_t* in, uint32_t* out, int64_t transpose) {
  auto* kernel = transpose ? ldmatrix_kernel<true> : ldmatrix_kernel<false>;
  return message_of([&] { launch({1, 32, 0, nullptr}, kernel, in, out); });
}
const char* cp_async_test(const uint4* in, uint4* out) {
  return message_of([&] { launch({1, 32, 0, nullptr}, cp_async_kernel, in, out); });
}
const char* prefetch_test(const int* in, int* out) {
  return message_of([&] { launch({1, 64, 0, nullptr}, prefetch_kernel, in, out); });
}
const char* ex2_test(const float* in, float* out) {
  return message_of([&] { launch({1, 64, 0, nullptr}, ex2_kernel, in, out); });
}
const char* pack_test(const float* in, uint32_t* out, int64_t half) {
  auto* kernel = half ? pack_kernel<f16> : pack_kernel<bf16>;
  return message_of([&] { launch({1, 64, 0, nullptr}, kernel, in, out); });
}
const char* tf32_test(const float* in, uint32_t* out) {
  return message_of([&] { launch({1, 64, 0, nullptr}, tf32_kernel, in, out); });
}
const char* bounds_test(int* out, int64_t threads) {
  return message_of([&] { launch({1, unsigned(threads), 0, nullptr}, bounds_kernel, out); });
}
const char* dynamic_shared_test(int* out, int64_t count) {
  return message_of(
      [&] { launch({1, 128, count * sizeof(int), nullptr}, dynamic_shared_kernel, out, int(count)); });
}
const char* warp_test(const int* in, int* out) {
  return message_of([&] { launch({1, 64, 0, nullptr}, warp_kernel, in, out); });
}
const char* atomic_test(const float* x, int64_t n, float* sum, int* histogram, unsigned* largest,
                        unsigned long long* count) {
  return message_of(
      [&] { launch({5, 96, 0, nullptr}, atomic_kernel, x, int(n), sum, histogram, largest, count); });
}
const char* convert_test(const float* in, void* out, float* back, int64_t n, int64_t kind) {
  const LaunchConfig config(unsigned((n + 255) / 256), 256, 0, nullptr);
  return message_of([&] {
    if (kind == 0)
      launch(config, convert_kernel<bf16>, in, static_cast<bf16*>(out), back, int(n));
    else
      launch(config, convert_kernel<f16>, in, static_cast<f16*>(out), back, int(n));
  });
}
const char* bug_test(int* out, const int* in, int64_t bug) {
  return message_of([&] { launch({bug == 14 ? 2u : 1u, 64, 0, nullptr}, bug_kernel, out, in, int(bug)); });
}

}  // extern "C"
