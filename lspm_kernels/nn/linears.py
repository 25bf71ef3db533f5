"""Linear layers: torch.nn.Linear over our products, with an activation where wanted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels import checks, products
from lspm_kernels.nn import calls, elementwise
from lspm_kernels.ops import linear as ops
from lspm_kernels.ops.bias_act import ACTIVATIONS, bias_act

_F32 = torch.float32
# linear_many_rows/forward/float32/64x768-to-3072: 2.1 times as fast as torch's, 64x64-to-64 0.4. Rows times
# columns of the weight.
_LEAST_OPERATIONS = 2**22
# linear/forward/bfloat16/1x768-to-3072: 2.0, /float32 2.7, of up to 8 rows without a gradient; 2x768-to-768
# 1.4, 1x256-to-256 0.5.
_LEAST_OF_FEW_ROWS = 2**19
_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Linear(nn.Linear):
    """torch.nn.Linear, with an activation behind it where wanted: y = activation(x weight^T + bias).

    Products in float32 are ours on processors where those are faster, see lspm_kernels/products.py, and so
    are those of few rows without a gradient. With an activation the bias is added in the same pass.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear's.
        activation: None, "gelu" (by erf), "gelu_tanh", "silu" or "relu".

    Raises:
        ValueError: there is no such activation.
    """

    activation: str | None = None  # of the class, so that a torch.nn.Linear may become one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation is not None:
            if activation not in ACTIVATIONS:
                names = ", ".join(map(repr, ACTIVATIONS))
                raise ValueError(f"Linear: activation must be None or one of {names}, got {activation!r}")
            self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        activation = self.activation
        if calls.parametrized(self):
            y = super().forward(input)
            return y if activation is None else _FUNCTIONS[activation](y)
        weight, bias = self.weight, self.bias
        if activation is None:
            if products.faster and takes(input, weight, bias):
                return ops.product(input, weight, bias, None)
            return super().forward(input)
        if not elementwise.takes(input, 1) or not calls.plain(input, weight, bias) or not weight.is_cpu:
            return _FUNCTIONS[activation](super().forward(input))
        ours = products.faster and takes(input, weight, None)
        y = ops.product(input, weight, None, None) if ours else F.linear(input, weight)
        if bias is not None and bias.dtype not in (y.dtype, _F32):
            bias = bias.to(y.dtype)  # as autocast does
        return bias_act(y, bias, activation)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self.activation is None else f"{shown}, activation={self.activation!r}"


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our product of x, (..., K) on a CPU, is the faster one, given that products.faster."""
    if type(x) is not Tensor or not x.is_cpu:
        return False
    few = x.numel() <= ops.MOST_ROWS * weight.shape[1] and not calls.records(x, weight, bias)
    if few and (not x.numel() or weight.numel() < _LEAST_OF_FEW_ROWS):
        return False
    if not few and (x.dtype is not _F32 or x.numel() * len(weight) < _LEAST_OPERATIONS):
        return False
    if not (calls.plain(x, weight, bias) and x.dim() > 0 and calls.alike(x, weight, bias)):
        return False
    if x.shape[-1:] != weight.shape[1:] or checks.autocasts(x.device):
        return False
    return few or products.is_ours(products.flat(x), weight.t())


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias of a CPU's tensors of one dtype, by the faster product."""
    if products.faster and x.dtype is _F32 and not checks.autocasts(x.device):
        return products.linear(products.flat(x), weight, bias).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)
