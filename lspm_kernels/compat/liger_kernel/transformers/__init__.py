"""liger_kernel.transformers: Liger's modules and functions.

Inputs are left as they are, where Liger's losses write their gradients into them. An option that our kernels
do not carry is refused by an error that names it.
"""

from lspm_kernels.compat.liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
from lspm_kernels.compat.liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm
from lspm_kernels.compat.liger_kernel.transformers.fused_linear_cross_entropy import (
    LigerFusedLinearCrossEntropyLoss,
)
from lspm_kernels.compat.liger_kernel.transformers.geglu import LigerGEGLUMLP
from lspm_kernels.compat.liger_kernel.transformers.layer_norm import LigerLayerNorm
from lspm_kernels.compat.liger_kernel.transformers.rms_norm import LigerRMSNorm
from lspm_kernels.compat.liger_kernel.transformers.rope import liger_rotary_pos_emb
from lspm_kernels.compat.liger_kernel.transformers.swiglu import (
    LigerBlockSparseTop2MLP,
    LigerPhi3SwiGLUMLP,
    LigerQwen3MoeSwiGLUMLP,
    LigerSwiGLUMLP,
)

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerCrossEntropyLoss",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerPhi3SwiGLUMLP",
    "LigerQwen3MoeSwiGLUMLP",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "liger_rotary_pos_emb",
]
