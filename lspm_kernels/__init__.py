"""Fused kernels that make large pretrained models faster and smaller in PyTorch, on GPUs and on CPUs."""

from lspm_kernels.dispatch import FallbackWarning, use_backend
from lspm_kernels.ops.attention import attention
from lspm_kernels.ops.attention_varlen import attention_varlen
from lspm_kernels.ops.attention_with_kv_cache import attention_with_kv_cache
from lspm_kernels.ops.batch_norm_act import batch_norm_act
from lspm_kernels.ops.conv2d import conv2d
from lspm_kernels.ops.conv2d_batch_norm import conv2d_batch_norm
from lspm_kernels.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from lspm_kernels.ops.rotary import rotary

__all__ = [
    "FallbackWarning",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "batch_norm_act",
    "conv2d",
    "conv2d_batch_norm",
    "layer_norm",
    "rms_norm",
    "rotary",
    "use_backend",
]
