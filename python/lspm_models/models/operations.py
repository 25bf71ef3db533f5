"""The operations that models are built from, by our kernels or by plain PyTorch at its best.

One model definition then stands on both sides of a comparison: GPT(config) and GPT(config, ops=PLAIN).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels


@dataclass(frozen=True)
class Operations:
    """Functions with the signatures of their namesakes in lspm_kernels."""

    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    queries, keys = q.shape[-2], k.shape[-2]
    if not causal or queries == 1:
        return F.scaled_dot_product_attention(q, k, v)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # is_causal lets the first query see the first key; here the last query sees the last key.
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100
) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index)


FUSED = Operations(
    lspm_kernels.layer_norm,
    lspm_kernels.add_layer_norm,
    lspm_kernels.attention,
    lspm_kernels.linear_cross_entropy,
)
PLAIN = Operations(_layer_norm, _add_layer_norm, _attention, _linear_cross_entropy)
