// What the instructions of csrc/cuda/ptx.cuh do, in C++: functions of the same names for kernels compiled by
// g++, over models of the warp-wide ones that translated PTX uses too.
#pragma once
#include "common.cuh"

namespace lspm::cuda::ptx {

// Operands of one lane. A is 16 x K row-major, B is K x 8 by columns, D is 16 x 8. With g = lane / 4 and
// q = lane % 4: d[i] is at row g + 8 (i / 2), column 2 q + i % 2.
struct Mma {
  float d[4];
  uint32_t a[4], b[2];
};
template <int kDepth>
EMU_RAW inline void multiply(void* operands[32], const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  emu::count(emu::MMA);
  float d[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k)
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Mma*>(operands[lane])->d[i] += d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}
template <class T>
EMU_RAW inline void model_mma_16816(void* operands[32], unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mma = *static_cast<Mma*>(operands[lane]);
    const int g = lane / 4, q = lane % 4;
    T pair[2];
    for (int i = 0; i < 4; ++i) {  // a[i]: row g + 8 (i % 2), columns 2 q + {0, 1} + 8 (i / 2)
      memcpy(pair, &mma.a[i], sizeof pair);
      for (int e = 0; e < 2; ++e) a[g + 8 * (i % 2)][2 * q + e + 8 * (i / 2)] = to_float(pair[e]);
    }
    for (int i = 0; i < 2; ++i) {  // b[i]: rows 2 q + {0, 1} + 8 i, column g
      memcpy(pair, &mma.b[i], sizeof pair);
      for (int e = 0; e < 2; ++e) b[2 * q + e + 8 * i][g] = to_float(pair[e]);
    }
  }
  multiply(operands, a, b);
}
EMU_RAW inline void model_mma_1688_tf32(void* operands[32], unsigned) {
  float a[16][8], b[8][8];
  auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & ~0x1FFFu); };  // the hardware drops 13 bits
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mma = *static_cast<Mma*>(operands[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][q + 4 * (i / 2)] = tf32(mma.a[i]);
    for (int i = 0; i < 2; ++i) b[q + 4 * i][g] = tf32(mma.b[i]);
  }
  multiply(operands, a, b);
}

// Lane 8 i + r gives the address of row r of matrix i, 16 bytes; r[i] of lane l is row l / 4, columns
// 2 (l % 4) + {0, 1} of matrix i, or of its transpose.
struct LdMatrix {
  uint32_t r[4];
  const void* row;
};
template <bool kTranspose, int kMatrices = 4>
EMU_RAW inline void model_ldmatrix(void* operands[32], unsigned) {
  emu::count(emu::LDMATRIX);
  for (int i = 0; i < kMatrices; ++i) {
    uint16_t matrix[8][8];
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const void* from = static_cast<LdMatrix*>(operands[8 * i + row])->row;
      banks |= 1u << (reinterpret_cast<uintptr_t>(from) / 16 % 8);
      memcpy(matrix[row], from, sizeof matrix[row]);
    }
    emu::count(emu::LDMATRIX_CONFLICT, 8 - __builtin_popcount(banks));
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, col = 2 * (lane % 4);
      const uint32_t low = kTranspose ? matrix[col][row] : matrix[row][col];
      const uint32_t high = kTranspose ? matrix[col + 1][row] : matrix[row][col + 1];
      static_cast<LdMatrix*>(operands[lane])->r[i] = low | high << 16;
    }
  }
}

template <class T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      emu::Site at = emu::Site::here()) {
  Mma mma = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emu::collective("mma.m16n8k16", ~0u, true, model_mma_16816<T>, &mma, at);
  memcpy(d, mma.d, sizeof mma.d);
}
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          emu::Site at = emu::Site::here()) {
  Mma mma = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emu::collective("mma.m16n8k8.tf32", ~0u, true, model_mma_1688_tf32, &mma, at);
  memcpy(d, mma.d, sizeof mma.d);
}
inline uint32_t cvt_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? (bits + 0x1000) & ~0x1FFFu : bits;
}

inline void check_row(const void* row, emu::Access access, const char* what, emu::Site at) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emu::fail("%s: row address not 16-byte aligned (%s:%d)", what, at.file, at.line);
  emu::check_access(row, 16, access, true, what, at);
}
template <bool kTranspose = false>
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, emu::Site at = emu::Site::here()) {
  check_row(row, emu::Access::read, "ldmatrix", at);
  LdMatrix matrix = {{}, row};
  emu::collective("ldmatrix", ~0u, true, model_ldmatrix<kTranspose>, &matrix, at);
  memcpy(r, matrix.r, sizeof matrix.r);
}

inline void cp_async16(void* to, const void* from, bool valid = true, emu::Site at = emu::Site::here()) {
  emu::cp_async(to, from, 16, valid ? 16 : 0, at);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
inline void prefetch(const void*) {}  // no caches here
template <int kPending>
inline void cp_async_wait() {
  emu::cp_async_wait(kPending);
}

template <class T>
inline uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

inline float ex2(float x) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  const float y = exp2f(x);
  return y < kSmallestNormal ? 0.0f : y;
}

}  // namespace lspm::cuda::ptx
