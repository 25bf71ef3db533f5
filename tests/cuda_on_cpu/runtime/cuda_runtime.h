// Stand-in for NVIDIA's header when g++ compiles kernels for the emulator: the language, the launch, the
// math. Raw __shared__ is deliberately missing: SHARED and DYNAMIC_SHARED let the emulator poison and guard
// it.
#pragma once
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emu.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
constexpr int warpSize = 32;

#define SHARED(type, name, extents)                                                  \
  using name##_type = std::remove_reference_t<decltype(*(type(*) extents) nullptr)>; \
  static const char name##_key = 0;                                                  \
  name##_type& name = *static_cast<name##_type*>(::emu::shared_array(&name##_key, #name, sizeof(name##_type)))
#define DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::emu::dynamic_shared())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emu {
template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emu

#include "atomics.h"
#include "warp.h"

static inline unsigned __float_as_uint(float value) { return unsigned(emu::to_bits(value)); }
static inline float __uint_as_float(unsigned bits) { return emu::from_bits<float>(bits); }
static inline int __float_as_int(float value) { return int(emu::to_bits(value)); }
static inline float __int_as_float(int bits) { return emu::from_bits<float>(unsigned(bits)); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define __expf(x) expf(x)  // macros, because glibc has functions of these names
#define __logf(x) logf(x)
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
constexpr std::enable_if_t<std::is_arithmetic<T>::value, T> max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
constexpr std::enable_if_t<std::is_arithmetic<T>::value, T> min(T a, T b) {
  return a < b ? a : b;
}

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
extern "C" {
const char* emu_last_error();
void emu_set_smem_optin(const void* kernel, size_t bytes);
int emu_current_device();
void emu_set_device(int device);
void emu_note_launch(cudaStream_t stream);
}
static inline cudaError_t cudaGetLastError() {
  return emu_last_error() ? cudaErrorLaunchFailure : cudaSuccess;
}
static inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
         : emu_last_error()              ? emu_last_error()
                                         : "no error";
}
constexpr int kEmulatedDevices = 4;
static inline cudaError_t cudaGetDevice(int* device) {
  *device = emu_current_device();
  return cudaSuccess;
}
static inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kEmulatedDevices) return cudaErrorInvalidDevice;
  emu_set_device(device);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  emu_set_smem_optin(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... from) {
  std::tuple<std::decay_t<Parameters>...> arguments(std::forward<Arguments>(from)...);
  void* pointers[sizeof...(Parameters) + 1];
  std::apply(
      [&](auto&... argument) {
        int i = 0;
        ((pointers[i++] = &argument), ...);
      },
      arguments);
  auto run = [&] { std::apply(kernel, arguments); };
  emu_note_launch(config->stream);
  emu::launch(
      reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, config->dynamicSmemBytes,
      [](void* context) { (*static_cast<decltype(run)*>(context))(); }, &run, pointers);
  return cudaGetLastError();
}
