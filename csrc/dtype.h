// The element types of tensors, as the kernels name them.
#pragma once
#include <cstdint>

namespace lspm {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i64 = 3, b8 = 4, i32 = 5, other = 6 };

// Storage only: arithmetic is always in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace lspm
