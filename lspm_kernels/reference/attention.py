"""Scaled dot-product attention in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v in float32 at least; the last query sees the last key where causal."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        queries, keys = scores.shape[-2:]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        scores = scores.masked_fill(~visible, float("-inf"))
        # A query that sees no key gives 0, and no gradient.
        scores = scores.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        return ((scores.softmax(-1) * visible) @ v).to(q.dtype)
    return (scores.softmax(-1) @ v).to(q.dtype)
