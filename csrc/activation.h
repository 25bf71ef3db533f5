// What may be applied to a sum, as torch.nn.functional names it; gelu is the one with erf. Convolutions and
// batch norms take all but gelu_tanh.
#pragma once
#include <cstdint>

namespace lspm {

enum class Activation : int { none = 0, relu = 1, relu6 = 2, silu = 3, gelu = 4, gelu_tanh = 5 };

}  // namespace lspm
