// What every kernel file includes: launching, checking, converting, moving vectors, summing over a row.
//
// The kernels are compiled by nvcc and, for the tests, by g++ against stand-ins for NVIDIA's headers
// (tests/cuda_on_cpu/README.md). So shared memory is declared by SHARED and DYNAMIC_SHARED, kernels start
// through launch(), and PTX instructions stand in ptx.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../dtype.h"

#ifdef __CUDACC__
#define SHARED(type, name, extents) __shared__ type name extents
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace lspm::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// Throws what CUDA says about a failed call, and clears it so that the next caller does not meet it again.
inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const char* slash = strrchr(file, '/');
  throw std::runtime_error(std::string(call) + " failed at " + (slash ? slash + 1 : file) + ":" +
                           std::to_string(line) + ": " + cudaGetErrorString(error));
}
#define LSPM_CUDA_CHECK(call) ::lspm::cuda::check(call, #call, __FILE__, __LINE__)

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    LSPM_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) LSPM_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

// Where and how a kernel starts; remembers the line that says so, for the error message.
struct LaunchConfig {
  LaunchConfig(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
               const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : grid(grid), block(block), shared_bytes(shared_bytes), stream(stream), file(file), line(line) {}
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  const char* file;
  int line;
};

// launch({grid, block, shared_bytes, stream}, kernel, arguments...)
template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& at, void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr size_t kWithoutOptIn = 48 * 1024;  // CUDA's limit for a kernel that has not asked for more
  if (at.shared_bytes > kWithoutOptIn)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared_bytes)),
          "cudaFuncSetAttribute", at.file, at.line);
  cudaLaunchConfig_t config = {};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "cudaLaunchKernelEx",
        at.file, at.line);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(f16 value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
  return __float2half_rn(value);
}

constexpr int kVectorBytes = 16;  // the widest access of one thread

// kWidth elements moved together, in accesses of at most 16 bytes.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < kVectorBytes ? sizeof(T) * kWidth : kVectorBytes) Vec {
  T at[kWidth];
};
template <int kWidth, class T>
__device__ __forceinline__ Vec<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Vec<T, kWidth>*>(from);
}
// For what is read once: it leaves the caches first, and the weights stay.
template <int kWidth, class T>
__device__ __forceinline__ Vec<T, kWidth> load_streaming(const T* from) {
  static_assert(sizeof(Vec<T, kWidth>) == kVectorBytes, "one 16-byte access");
  const int4 bits = __ldcs(reinterpret_cast<const int4*>(from));
  Vec<T, kWidth> vector;
  memcpy(&vector, &bits, kVectorBytes);
  return vector;
}
template <class T, int kWidth>
__device__ __forceinline__ void store(T* to, const Vec<T, kWidth>& vector) {
  *reinterpret_cast<Vec<T, kWidth>*>(to) = vector;
}
template <class... T>
bool aligned_for_vectors(const T*... pointers) {  // null counts as aligned
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % kVectorBytes) == 0;
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Of an accumulator's fragment of 16 x 8, a lane has element 2 h + e in row lane_row() + 8 h and column
// lane_column() + e.
__device__ __forceinline__ int lane_row() { return threadIdx.x % kWarp / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }
constexpr int kChunk = 8;  // elements of 16 bits in the 16 bytes that copies and ldmatrix move

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
__device__ __forceinline__ float2 warp_sum(float2 pair) { return float2{warp_sum(pair.x), warp_sum(pair.y)}; }
// The sum over the threads of equal threadIdx.y, given to each; T is float or float2. blockDim.x is a
// multiple of the warp size, and every thread of the block calls.
template <class T>
__device__ __forceinline__ T row_sum(T value) {
  value = warp_sum(value);
  if (blockDim.x == kWarp) return value;
  SHARED(T, warp_sums, [32]);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // the previous call has read its sums
  if (lane == 0) warp_sums[threadIdx.y * warps + threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? warp_sums[threadIdx.y * warps + lane] : T{});
}

// The types of an op's data and of its parameters, which are of the data's type or float.
template <class T, class W>
struct Types {
  using Data = T;
  using Parameter = W;
};

// Calls body(Types<T, W>()) for the two dtypes. An error names `op`, and `name`, the second dtype's.
template <class Body>
void with_types(const char* op, DType dtype, const char* name, DType parameter_dtype, Body body) {
  const auto refuse = [&](const std::string& rule, DType got) {
    throw std::invalid_argument(std::string(op) + ": " + rule + ", got " + std::to_string(int(got)));
  };
  const bool same = parameter_dtype == dtype;
  if (!same && parameter_dtype != DType::f32)
    refuse(std::string(name) + " must be dtype or f32", parameter_dtype);
  switch (dtype) {
    case DType::f32:
      return body(Types<float, float>());
    case DType::bf16:
      return same ? body(Types<bf16, bf16>()) : body(Types<bf16, float>());
    case DType::f16:
      return same ? body(Types<f16, f16>()) : body(Types<f16, float>());
    default:
      refuse("dtype must be f32, bf16 or f16", dtype);
  }
}

// Calls body(T()) for a dtype that tensor cores multiply.
template <class Body>
void with_type(const char* op, DType dtype, Body body) {
  switch (dtype) {
    case DType::bf16:
      return body(bf16());
    case DType::f16:
      return body(f16());
    default:
      throw std::invalid_argument(std::string(op) + ": dtype must be bf16 or f16, got " +
                                  std::to_string(int(dtype)));
  }
}

}  // namespace lspm::cuda
