// cuda_runtime.h - stand-in for NVIDIA's header when kernels are compiled by g++ for the emulator.
// Raw __shared__ is deliberately not defined: kernels use SHARED() and DYNAMIC_SHARED(), which the
// emulator can poison and guard.
#pragma once
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emu.h"

#define EMU_CUDA 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (::emu::cur->tid)
#define blockIdx (::emu::cur->bid)
#define blockDim (::emu::cur->bdim)
#define gridDim (::emu::cur->gdim)
constexpr int warpSize = 32;

// SHARED(float, tile, [8][33]);  DYNAMIC_SHARED(smem);  (common.cuh has nvcc's versions)
#define SHARED(T, name, dims)                 \
  using name##_t = std::remove_reference_t<decltype(*(T(*) dims) nullptr)>; \
  static const char name##_key = 0;           \
  name##_t& name = *static_cast<name##_t*>(::emu::shared_array(&name##_key, #name, sizeof(name##_t)))
#define DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::emu::dynamic_shared())

// ---- vector types
#define EMU_VEC(T, N, A)                                                                       \
  struct alignas(sizeof(T) * 2 * A / 2) N##2 { T x, y; };                                      \
  struct N##3 { T x, y, z; };                                                                  \
  struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) N##4 { T x, y, z, w; };              \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                  \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 emu_uint3  // emu.h has it
EMU_VEC(float, float, 2) EMU_VEC(int, int, 2) EMU_VEC(unsigned, uint, 2) EMU_VEC(short, short, 2) EMU_VEC(unsigned short, ushort, 2)
EMU_VEC(double, double, 2)
#undef uint3

// ---- barriers, votes, shuffles
static inline void __syncthreads(EMU_HERE) { emu::barrier(0, file, line); }
static inline int __syncthreads_count(int p, EMU_HERE) { return emu::barrier(p, file, line); }
static inline int __syncthreads_or(int p, EMU_HERE) { return emu::barrier(p, file, line) > 0; }
static inline int __syncthreads_and(int p, EMU_HERE) { return emu::barrier(!p, file, line) == 0; }
static inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) { emu::sync_warp(mask, file, line); }
static inline unsigned __activemask() { return emu::active_mask(); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() {}

namespace emu {
struct Shuffle { uint64_t in, out; int src; };
EMU_RAW inline void do_shuffle(void* io[32], unsigned mask) {
  count(SHUFFLE);
  for (unsigned m = mask; m; m &= m - 1) {
    Shuffle* s = (Shuffle*)io[__builtin_ctz(m)];
    s->out = s->src < 0 ? s->in : io[s->src] ? ((Shuffle*)io[s->src])->in : ~0ull;  // absent lane: poison
  }
}
template <class T>
T shuffle(const char* op, unsigned mask, T v, int src, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffle of at most 8 bytes");
  Shuffle s = {0, 0, src};
  std::memcpy(&s.in, &v, sizeof v);
  collective(op, mask, false, do_shuffle, &s, file, line);
  std::memcpy(&v, &s.out, sizeof v);
  return v;
}
struct Vote { uint64_t in, out; };
template <class F>
void reduce_all(void* io[32], unsigned mask, F f) {
  uint64_t r = 0;
  bool first = true;
  for (unsigned m = mask; m; m &= m - 1, first = false) {
    uint64_t v = ((Vote*)io[__builtin_ctz(m)])->in;
    r = first ? v : f(r, v);
  }
  for (unsigned m = mask; m; m &= m - 1) ((Vote*)io[__builtin_ctz(m)])->out = r;
}
EMU_RAW inline void do_or(void* io[32], unsigned m) { reduce_all(io, m, [](uint64_t a, uint64_t b) { return a | b; }); }
EMU_RAW inline void do_add(void* io[32], unsigned m) { reduce_all(io, m, [](uint64_t a, uint64_t b) { return a + b; }); }
EMU_RAW inline void do_umax(void* io[32], unsigned m) { reduce_all(io, m, [](uint64_t a, uint64_t b) { return a > b ? a : b; }); }
static inline uint64_t vote(const char* op, unsigned mask, uint64_t v, WarpFn fn, const char* file, int line) {
  Vote x = {v, 0};
  collective(op, mask, false, fn, &x, file, line);
  return x.out;
}
}  // namespace emu

// Source lane, or -1 for "own value" (out of the segment), as PTX shfl defines it.
template <class T>
T __shfl_sync(unsigned m, T v, int l, int w = 32, EMU_HERE) {
  int lane = emu::cur->lane;
  return emu::shuffle("__shfl_sync", m, v, (lane & -w) | (l & (w - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, EMU_HERE) {
  int lane = emu::cur->lane, s = lane ^ x;
  return emu::shuffle("__shfl_xor_sync", m, v, s >= (lane & -w) + w ? -1 : s, file, line);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, EMU_HERE) {
  int lane = emu::cur->lane, s = lane + d;
  return emu::shuffle("__shfl_down_sync", m, v, s >= (lane & -w) + w ? -1 : s, file, line);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, EMU_HERE) {
  int lane = emu::cur->lane, s = lane - (int)d;
  return emu::shuffle("__shfl_up_sync", m, v, s < (lane & -w) ? -1 : s, file, line);
}
static inline unsigned __ballot_sync(unsigned m, int p, EMU_HERE) { return emu::vote("__ballot_sync", m, p ? 1u << emu::cur->lane : 0, emu::do_or, file, line); }
static inline int __any_sync(unsigned m, int p, EMU_HERE) { return emu::vote("__any_sync", m, p != 0, emu::do_or, file, line); }
static inline int __all_sync(unsigned m, int p, EMU_HERE) { return !emu::vote("__all_sync", m, p == 0, emu::do_or, file, line); }
static inline unsigned __reduce_add_sync(unsigned m, unsigned v, EMU_HERE) { return emu::vote("__reduce_add_sync", m, v, emu::do_add, file, line); }
static inline unsigned __reduce_max_sync(unsigned m, unsigned v, EMU_HERE) { return emu::vote("__reduce_max_sync", m, v, emu::do_umax, file, line); }

// ---- atomics (sequentially consistent; the checker lets atomics race with atomics only)
namespace emu {
template <class T> uint64_t to_bits(T v) { uint64_t b = 0; std::memcpy(&b, &v, sizeof v); return b; }
template <class T> T from_bits(uint64_t b) { T v; std::memcpy(&v, &b, sizeof v); return v; }
}
#define EMU_ATOMIC(NAME, EXPR)                                                                  \
  template <class T> T NAME(T* p, std::common_type_t<T> v, EMU_HERE) {                                    \
    return emu::from_bits<T>(emu::atomic_rmw(p, sizeof(T), [](uint64_t o_, uint64_t a_, uint64_t) { \
      T o = emu::from_bits<T>(o_), a = emu::from_bits<T>(a_); (void)o;                          \
      return emu::to_bits<T>(EXPR); }, emu::to_bits<T>(v), 0, file, line));                                 \
  }
EMU_ATOMIC(atomicAdd, T(o + a)) EMU_ATOMIC(atomicSub, T(o - a)) EMU_ATOMIC(atomicExch, a) EMU_ATOMIC(atomicMax, o > a ? o : a)
EMU_ATOMIC(atomicMin, o < a ? o : a) EMU_ATOMIC(atomicOr, T(o | a)) EMU_ATOMIC(atomicAnd, T(o & a)) EMU_ATOMIC(atomicXor, T(o ^ a))
template <class T> T atomicCAS(T* p, std::common_type_t<T> cmp, std::common_type_t<T> v, EMU_HERE) {
  return emu::from_bits<T>(emu::atomic_rmw(p, sizeof(T), [](uint64_t o, uint64_t c, uint64_t n) { return o == c ? n : o; },
                                           emu::to_bits<T>(cmp), emu::to_bits<T>(v), file, line));
}

// ---- math and bits
#define __expf(x) expf(x)  // macros: glibc has functions of these names
#define __logf(x) logf(x)
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline unsigned __float_as_uint(float f) { return (unsigned)emu::to_bits(f); }
static inline float __uint_as_float(unsigned u) { return emu::from_bits<float>(u); }
static inline int __float_as_int(float f) { return (int)emu::to_bits(f); }
static inline float __int_as_float(int u) { return emu::from_bits<float>((unsigned)u); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> constexpr std::enable_if_t<std::is_arithmetic<T>::value, T> max(T a, T b) { return a > b ? a : b; }
template <class T> constexpr std::enable_if_t<std::is_arithmetic<T>::value, T> min(T a, T b) { return a < b ? a : b; }

// ---- runtime API, the part that launching needs
typedef struct emu_stream* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim_, blockDim_;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
extern "C" {
void* emu_malloc(size_t);
void emu_free(void*);
void emu_memcpy(void*, const void*, size_t);
void emu_memset(void*, int, size_t);
const char* emu_last_error();
void emu_set_smem_optin(const void*, size_t);
}
template <class F> cudaError_t cudaFuncSetAttribute(F* f, cudaFuncAttribute, int v) { emu_set_smem_optin((const void*)f, v); return cudaSuccess; }
static inline cudaError_t cudaGetLastError() { return emu_last_error() ? cudaErrorUnknown : cudaSuccess; }
static inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { emu_memset(p, v, n); return cudaSuccess; }

template <class... P, class... A>
cudaError_t emu_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A&&... a) {
  std::tuple<std::decay_t<P>...> args(std::forward<A>(a)...);
  auto body = [&] { std::apply(kernel, args); };
  void* argv[sizeof...(P) + 1];
  std::apply([&](auto&... x) { int i = 0; ((argv[i++] = &x), ...); }, args);
  emu::launch((const void*)kernel, grid, block, smem, [](void* c) { (*static_cast<decltype(body)*>(c))(); }, &body, argv);
  return cudaGetLastError();
}
