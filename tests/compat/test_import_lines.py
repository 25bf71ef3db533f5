"""The import lines of other libraries' users: lspm_kernels.compat. before the name is the whole change.

liger is the shorter name of liger_kernel.transformers.
"""

import pytest

import lspm_kernels.compat

LINES = """
from apex.contrib.xentropy import SoftmaxCrossEntropyLoss
from apex.normalization import FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm
from apex.normalization.fused_layer_norm import FusedLayerNorm, MixedFusedRMSNorm, fused_layer_norm_affine
from apex.optimizers import FusedAdam
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import FusedDense, FusedMLP
from flash_attn.ops.layer_norm import DropoutAddLayerNorm, dropout_add_layer_norm
from flash_attn.ops.rms_norm import RMSNorm, rms_norm
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from liger import LigerFusedLinearCrossEntropyLoss, LigerRMSNorm
from liger.functional import liger_rms_norm, liger_swiglu
from liger_kernel.transformers import LigerCrossEntropyLoss, LigerRMSNorm, liger_rotary_pos_emb
from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy
from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from liger_kernel.transformers.geglu import LigerGEGLUMLP
from liger_kernel.transformers.layer_norm import LigerLayerNorm
from liger_kernel.transformers.llama4_rope import liger_llama4_text_rotary_pos_emb
from liger_kernel.transformers.mlp import LigerMLP
from liger_kernel.transformers.rms_norm import LigerRMSNorm
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from liger_kernel.transformers.swiglu import LigerExperts, LigerPhi3SwiGLUMLP, LigerSwiGLUMLP
from liger_kernel.transformers.tiled_mlp import LigerTiledGEGLUMLP, LigerTiledSwiGLUMLP
"""


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_a_line(line):
    exec(line.replace("from ", f"from {lspm_kernels.compat.__name__}.", 1), {})
