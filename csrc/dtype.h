// The element types of tensors, as the kernels name them, and what marks functions of both sides.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LSPM_HOST_DEVICE __host__ __device__
#else
#define LSPM_HOST_DEVICE
#endif

namespace lspm {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i64 = 3, b8 = 4, i32 = 5, u8 = 6, i8 = 7, other = 8 };

// Storage only: arithmetic is always in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace lspm
