"""Activations and dropout: torch.nn's classes over bias_act and dropout, on a CPU.

No row shows these ops beside torch's on a GPU, so there they are torch's. ReLU is torch's everywhere: it
keeps its output, as the layer behind it does anyway, and bias_act would keep the input besides.
"""

from torch import Tensor, nn

from lspm_kernels.nn import calls
from lspm_kernels.ops.bias_act import bias_act
from lspm_kernels.ops.dropout import dropout

# bias_gelu_tanh/forward/float32/1x768: 0.66 times as fast as torch's; bias_gelu (by erf) 10.
_LEAST_OF_TANH = 2**12
# silu of 1024x3072: 1.4, and 2.4 in bfloat16; of 1x768: 0.34.
LEAST_OF_SILU = 2**17
# dropout with its backward on a Zen 4, of 1x4096: 0.4 to 0.9, of 1x8192 1.2 by one thread, of 1x65536 3.0.
_LEAST_OF_DROPOUT = 2**13


def takes(x: object, least: int) -> bool:
    """Whether x is contiguous memory of a CPU, of at least so many numbers."""
    if type(x) is not Tensor or x.numel() < least or not x.is_cpu:
        return False
    return calls.plain(x) and x.dim() > 0 and x.is_contiguous()


class GELU(nn.GELU):
    """torch.nn.GELU, by lspm_kernels.bias_act."""

    def forward(self, input: Tensor) -> Tensor:
        if self.approximate == "none":
            return bias_act(input) if takes(input, 1) else super().forward(input)
        if self.approximate == "tanh" and takes(input, _LEAST_OF_TANH):
            return bias_act(input, None, "gelu_tanh")
        return super().forward(input)


class SiLU(nn.SiLU):
    """torch.nn.SiLU, by lspm_kernels.bias_act."""

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace or not takes(input, LEAST_OF_SILU):
            return super().forward(input)
        return bias_act(input, None, "silu")


class Dropout(nn.Dropout):
    """torch.nn.Dropout, by lspm_kernels.dropout: a seed instead of a mask is kept for the backward.

    What is dropped is drawn from torch's default generator, but not the same as torch's drops.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not 0 < self.p <= 1 or self.inplace or not takes(input, _LEAST_OF_DROPOUT):
            return super().forward(input)
        return dropout(input, self.p)
