"""The operations that models are built from, by our kernels or by plain PyTorch at its best.

One model definition then stands on both sides of a comparison: GPT(config) and GPT(config, ops=PLAIN).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from lspm_kernels.reference.bias_act import ACTIVATIONS


@dataclass(frozen=True)
class Operations:
    """Functions with the signatures of their namesakes in lspm_kernels."""

    embedding: Callable[..., Tensor]
    dropout: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    attention_with_kv_cache: Callable[..., Tensor]
    bias_act: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    gated_mlp: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


def _embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | None = None,
    positions: Tensor | int = 0,
    token_type_weight: Tensor | None = None,
    token_types: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    x = F.embedding(tokens, weight)
    if position_weight is not None:
        if isinstance(positions, int):
            positions = slice(positions, positions + tokens.shape[-1])
        x = x + position_weight[positions]
    if token_type_weight is not None:
        x = x + F.embedding(token_types, token_type_weight)
    if norm_weight is not None:
        x = _layer_norm(x, norm_weight, norm_bias, eps)
    return F.dropout(x, dropout_p) if dropout_p else x


def _dropout(x: Tensor, p: float, *, residual: Tensor) -> Tensor:
    return residual + F.dropout(x, p)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    queries, keys = q.shape[-2], k.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if not causal:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, enable_gqa=grouped)
    if queries == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    # is_causal lets the first query see the first key; here the last query sees the last key.
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


def _attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: int | Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    causal: bool,
) -> Tensor:
    past = int(cache_seqlens if isinstance(cache_seqlens, int) else cache_seqlens[0])  # one for all
    end = past + k.shape[2]
    if cos is not None:
        rotation = cos[past:end], sin[past:end]
        q, k = _rotary(q, *rotation), _rotary(k, *rotation)
    k_cache[:, :, past:end], v_cache[:, :, past:end] = k, v
    return _attention(q, k_cache[:, :, :end], v_cache[:, :, :end], causal=causal)


def _bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](x if bias is None else x + bias)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, weight_in, bias_in)), weight_out, bias_out)


def _gated_mlp(
    x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor, *, activation: str
) -> Tensor:
    gate = ACTIVATIONS[activation](F.linear(x, weight_gate))
    return F.linear(gate * F.linear(x, weight_up), weight_down)


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index)


FUSED = Operations(
    lspm_kernels.embedding,
    lspm_kernels.dropout,
    lspm_kernels.layer_norm,
    lspm_kernels.add_layer_norm,
    lspm_kernels.rms_norm,
    lspm_kernels.add_rms_norm,
    lspm_kernels.rotary,
    lspm_kernels.attention,
    lspm_kernels.attention_with_kv_cache,
    lspm_kernels.bias_act,
    lspm_kernels.swiglu,
    lspm_kernels.linear,
    lspm_kernels.mlp,
    lspm_kernels.gated_mlp,
    lspm_kernels.linear_cross_entropy,
)
PLAIN = Operations(
    _embedding,
    _dropout,
    _layer_norm,
    _add_layer_norm,
    _rms_norm,
    _add_rms_norm,
    _rotary,
    _attention,
    _attention_with_kv_cache,
    _bias_act,
    _swiglu,
    F.linear,
    _mlp,
    _gated_mlp,
    _linear_cross_entropy,
)
