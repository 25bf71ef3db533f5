"""flash_attn.ops.activations: SwiGLU, and GELU by tanh with and without a bias."""

from torch import Tensor

from lspm_kernels.ops import swiglu as glu
from lspm_kernels.ops.bias_act import bias_act


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    return glu.swiglu(x, y)


def fast_gelu_impl(input: Tensor) -> Tensor:
    """GELU by tanh."""
    return bias_act(input, None, "gelu_tanh")


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """GELU of input + bias (C,), by tanh."""
    return bias_act(input, bias, "gelu_tanh")
