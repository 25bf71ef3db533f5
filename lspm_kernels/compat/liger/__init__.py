"""Liger-Kernel's modules and functions, over lspm_kernels' ops; another import is the whole change.

liger_kernel.transformers becomes lspm_kernels.compat.liger, and liger_kernel.transformers.functional
lspm_kernels.compat.liger.functional. Inputs are left as they are, where Liger's losses write their gradients
into them. An option that our kernels do not carry is refused by an error that names it.
"""

from lspm_kernels.compat.liger.functional import liger_rotary_pos_emb
from lspm_kernels.compat.liger.loss_modules import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
from lspm_kernels.compat.liger.modules import (
    LigerBlockSparseTop2MLP,
    LigerFusedAddRMSNorm,
    LigerGEGLUMLP,
    LigerLayerNorm,
    LigerPhi3SwiGLUMLP,
    LigerQwen3MoeSwiGLUMLP,
    LigerRMSNorm,
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
