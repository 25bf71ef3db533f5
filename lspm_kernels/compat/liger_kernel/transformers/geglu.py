"""liger_kernel.transformers.geglu: an MLP gated by GELU."""

from typing import Any

from torch import Tensor, nn

from lspm_kernels.compat.liger_kernel.transformers import functional as F
from lspm_kernels.compat.liger_kernel.transformers.swiglu import make_layers


class LigerGEGLUMLP(nn.Module):
    """down_proj(gelu(gate_proj(x)) * up_proj(x)), GELU by tanh, whatever activation is configured."""

    def __init__(self, config: Any):
        super().__init__()
        make_layers(self, config, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.liger_geglu(self.gate_proj(x), self.up_proj(x)))
