"""liger_kernel.transformers.mlp: MLPs gated by SiLU that keep less for their backwards."""

from typing import Any

from torch import Tensor

from lspm_kernels.compat.liger_kernel.transformers.swiglu import LigerFalconH1SwiGLUMLP, LigerSwiGLUMLP
from lspm_kernels.ops.mlp import gated_mlp


class LigerMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP by lspm_kernels.gated_mlp, whose backward computes the gated product again."""

    def __init__(self, config: Any):
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class LigerFalconH1MLP(LigerFalconH1SwiGLUMLP):
    """LigerFalconH1SwiGLUMLP without biases: one that is configured is an error."""

    def __init__(self, config: Any):
        if getattr(config, "mlp_bias", False):
            raise ValueError("LigerFalconH1MLP: config must have mlp_bias False, got True")
        super().__init__(config)
