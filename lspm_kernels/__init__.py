"""Fused kernels that make large pretrained models faster and smaller in PyTorch, on GPUs and on CPUs."""

from lspm_kernels import nn
from lspm_kernels.accelerate import accelerate, restore
from lspm_kernels.adamw import AdamW
from lspm_kernels.dispatch import FallbackWarning, use_backend
from lspm_kernels.fused_embedding_bag import FusedEmbeddingBag
from lspm_kernels.ops.adamw import adamw_, adamw_norm
from lspm_kernels.ops.attention import attention
from lspm_kernels.ops.attention_varlen import attention_varlen
from lspm_kernels.ops.attention_with_kv_cache import attention_with_kv_cache
from lspm_kernels.ops.batch_norm_act import batch_norm_act
from lspm_kernels.ops.bias_act import bias_act, bias_gelu
from lspm_kernels.ops.bpr import bpr_
from lspm_kernels.ops.conv2d import conv2d
from lspm_kernels.ops.conv2d_batch_norm import conv2d_batch_norm, fold_batch_norm
from lspm_kernels.ops.cross_entropy import cross_entropy
from lspm_kernels.ops.dropout import dropout
from lspm_kernels.ops.embedding import embedding
from lspm_kernels.ops.embedding_bag import embedding_bag
from lspm_kernels.ops.embedding_bag_update import (
    embedding_bag_adagrad_,
    embedding_bag_adam_,
    embedding_bag_sgd_,
)
from lspm_kernels.ops.global_avg_pool import global_avg_pool
from lspm_kernels.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from lspm_kernels.ops.linear import linear, quantize_int8
from lspm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from lspm_kernels.ops.max_pool2d import max_pool2d
from lspm_kernels.ops.mf import mf
from lspm_kernels.ops.mf_als import mf_als_, mf_als_loss
from lspm_kernels.ops.mf_sgd import mf_sgd_
from lspm_kernels.ops.mlp import gated_mlp, mlp
from lspm_kernels.ops.nmf import nmf_
from lspm_kernels.ops.rotary import rotary
from lspm_kernels.ops.sample import sample
from lspm_kernels.ops.swiglu import geglu, swiglu
from lspm_kernels.ops.top_k_scores import top_k_scores
from lspm_kernels.packed_conv2d import PackedConv2d
from lspm_kernels.rating_blocks import RatingBlocks, rating_blocks
from lspm_kernels.weight_only_linear import WeightOnlyLinear, weight_only_

__all__ = [
    "AdamW",
    "FallbackWarning",
    "FusedEmbeddingBag",
    "PackedConv2d",
    "RatingBlocks",
    "WeightOnlyLinear",
    "accelerate",
    "adamw_",
    "adamw_norm",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "batch_norm_act",
    "bias_act",
    "bias_gelu",
    "bpr_",
    "conv2d",
    "conv2d_batch_norm",
    "cross_entropy",
    "dropout",
    "embedding",
    "embedding_bag",
    "embedding_bag_adagrad_",
    "embedding_bag_adam_",
    "embedding_bag_sgd_",
    "fold_batch_norm",
    "gated_mlp",
    "geglu",
    "global_avg_pool",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "max_pool2d",
    "mf",
    "mf_als_",
    "mf_als_loss",
    "mf_sgd_",
    "mlp",
    "nmf_",
    "nn",
    "quantize_int8",
    "rating_blocks",
    "restore",
    "rms_norm",
    "rotary",
    "sample",
    "swiglu",
    "top_k_scores",
    "use_backend",
    "weight_only_",
]
