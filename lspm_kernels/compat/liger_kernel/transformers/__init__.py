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
from lspm_kernels.compat.liger_kernel.transformers.llama4_rope import (
    liger_llama4_text_rotary_pos_emb,
    liger_llama4_vision_rotary_pos_emb,
)
from lspm_kernels.compat.liger_kernel.transformers.mlp import LigerFalconH1MLP, LigerMLP
from lspm_kernels.compat.liger_kernel.transformers.rms_norm import LigerRMSNorm
from lspm_kernels.compat.liger_kernel.transformers.rope import liger_rotary_pos_emb
from lspm_kernels.compat.liger_kernel.transformers.swiglu import (
    LigerBlockSparseTop2MLP,
    LigerExperts,
    LigerFalconH1SwiGLUMLP,
    LigerPhi3SwiGLUMLP,
    LigerQwen3MoeSwiGLUMLP,
    LigerSwiGLUMLP,
)
from lspm_kernels.compat.liger_kernel.transformers.tiled_mlp import LigerTiledGEGLUMLP, LigerTiledSwiGLUMLP

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerCrossEntropyLoss",
    "LigerExperts",
    "LigerFalconH1MLP",
    "LigerFalconH1SwiGLUMLP",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerMLP",
    "LigerPhi3SwiGLUMLP",
    "LigerQwen3MoeSwiGLUMLP",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "LigerTiledGEGLUMLP",
    "LigerTiledSwiGLUMLP",
    "liger_llama4_text_rotary_pos_emb",
    "liger_llama4_vision_rotary_pos_emb",
    "liger_rotary_pos_emb",
]
