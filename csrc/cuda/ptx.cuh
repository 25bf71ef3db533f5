// ptx.cuh - every PTX instruction the kernels use, and nothing else: inline assembly under nvcc,
// a functional model under g++. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" etc.
#pragma once
#include "common.cuh"

namespace ptx {

#ifdef __CUDACC__
#define PTX_SITE
__device__ __forceinline__ uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
#else
#define PTX_SITE , EMU_HERE
// Operands of one lane; A is MxK row-major, B is KxN "col", C/D is MxN. g = lane / 4, q = lane % 4:
//   D (16x8): d[i] at row g + 8 * (i / 2), column 2q + i % 2.
struct Mma { float d[4]; uint32_t a[4], b[2]; };
template <class T> EMU_RAW inline void do_mma_16816(void* io[32], unsigned) {
  emu::count(emu::MMA);
  float A[16][16], B[16][8];
  for (int l = 0; l < 32; ++l) {
    const Mma& m = *(Mma*)io[l];
    int g = l / 4, q = l % 4;
    T h[2];
    for (int i = 0; i < 4; ++i) {  // a[i]: row g + 8 * (i % 2), columns 2q + {0, 1} + 8 * (i / 2)
      memcpy(h, &m.a[i], 4);
      for (int e = 0; e < 2; ++e) A[g + 8 * (i % 2)][2 * q + e + 8 * (i / 2)] = to_float(h[e]);
    }
    for (int i = 0; i < 2; ++i) {  // b[i]: rows 2q + {0, 1} + 8 * i, column g
      memcpy(h, &m.b[i], 4);
      for (int e = 0; e < 2; ++e) B[2 * q + e + 8 * i][g] = to_float(h[e]);
    }
  }
  float D[16][8] = {};
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < 8; ++c) D[r][c] += A[r][k] * B[k][c];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) ((Mma*)io[l])->d[i] += D[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}
EMU_RAW inline void do_mma_1688_tf32(void* io[32], unsigned) {
  emu::count(emu::MMA);
  float A[16][8], B[8][8];
  auto tf32 = [](uint32_t u) { return __uint_as_float(u & ~0x1FFFu); };  // the hardware drops 13 bits
  for (int l = 0; l < 32; ++l) {
    const Mma& m = *(Mma*)io[l];
    int g = l / 4, q = l % 4;
    for (int i = 0; i < 4; ++i) A[g + 8 * (i % 2)][q + 4 * (i / 2)] = tf32(m.a[i]);
    for (int i = 0; i < 2; ++i) B[q + 4 * i][g] = tf32(m.b[i]);
  }
  float D[16][8] = {};
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 8; ++k)
      for (int c = 0; c < 8; ++c) D[r][c] += A[r][k] * B[k][c];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) ((Mma*)io[l])->d[i] += D[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}
// Lane 8i + r gives the address of row r of 8x8 matrix i (16 bytes per row); r[i] of lane l then is
// row l / 4, columns 2 (l % 4) + {0, 1} of matrix i, or of its transpose.
struct LdMatrix { uint32_t r[4]; const void* row; };
template <bool TRANS, int N = 4> EMU_RAW inline void do_ldmatrix(void* io[32], unsigned) {
  emu::count(emu::LDMATRIX);
  uint16_t m[N][8][8];
  for (int i = 0; i < N; ++i) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      const void* p = ((LdMatrix*)io[8 * i + r])->row;
      banks |= 1u << ((uintptr_t)p / 16 % 8);
      memcpy(m[i][r], p, 16);
    }
    emu::count(emu::LDMATRIX_CONFLICT, 8 - __builtin_popcount(banks));
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < N; ++i) {
      int r = l / 4, c = 2 * (l % 4);
      ((LdMatrix*)io[l])->r[i] = TRANS ? m[i][c][r] | (uint32_t)m[i][c + 1][r] << 16 : m[i][r][c] | (uint32_t)m[i][r][c + 1] << 16;
    }
}
#endif

// d += a * b, fp32 accumulation; T is bf16 or __half, two packed per register (low half first).
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_SITE) {
#ifdef __CUDACC__
  if constexpr (std::is_same<T, bf16>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  Mma m = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emu::collective("mma.m16n8k16", ~0u, true, do_mma_16816<T>, &m, file, line);
  memcpy(d, m.d, sizeof m.d);
#endif
}

// d += a * b in tf32: operands are fp32 bit patterns, see cvt_tf32.
__device__ __forceinline__ void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_SITE) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  Mma m = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emu::collective("mma.m16n8k8.tf32", ~0u, true, do_mma_1688_tf32, &m, file, line);
  memcpy(d, m.d, sizeof m.d);
#endif
}
__device__ __forceinline__ uint32_t cvt_tf32(float f) {  // round to nearest, ties away
#ifdef __CUDACC__
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(f));
  return u;
#else
  uint32_t u = __float_as_uint(f);
  return (u & 0x7F800000) == 0x7F800000 ? u : (u + 0x1000) & ~0x1FFFu;
#endif
}

// Four 8x8 b16 matrices from shared memory; `row` is this lane's row address, 16-byte aligned.
template <bool TRANS = false>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row PTX_SITE) {
#ifdef __CUDACC__
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(row)) : "memory");
#else
  if ((uintptr_t)row % 16) emu::fail("ldmatrix: row address not 16-byte aligned (%s:%d)", file, line);
  emu::check_access(row, 16, emu::READ, true, "ldmatrix", file, line);
  LdMatrix m = {{}, row};
  emu::collective("ldmatrix", ~0u, true, do_ldmatrix<TRANS>, &m, file, line);
  memcpy(r, m.r, sizeof m.r);
#endif
}

// Asynchronous copy of 16 bytes, global to shared; zero-fills instead where !valid.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool valid = true PTX_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0) : "memory");
#else
  emu::cp_async(dst, src, 16, valid ? 16 : 0, file, line);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::cp_async_commit();
#endif
}
template <int N>  // wait until at most N of this thread's groups are in flight
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  emu::cp_async_wait(N);
#endif
}

__device__ __forceinline__ float ex2(float x) {  // 2^x, about 2 ulp; subnormal results flush to zero
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {  // two rounded values, lo in the low half
  Vec<T, 2> v;
  v.v[0] = from_float<T>(lo), v.v[1] = from_float<T>(hi);
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}

}  // namespace ptx
