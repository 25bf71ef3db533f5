// What an epilogue may apply to a sum, as torch.nn.functional names it; gelu is the one with erf.
#pragma once
#include <cstdint>

namespace lspm {

enum class Activation : int { none = 0, relu = 1, relu6 = 2, silu = 3, gelu = 4 };

}  // namespace lspm
