"""torch.nn.functional.scaled_dot_product_attention, over lspm_kernels.attention."""

import torch
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.ops.attention import attention

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T * scale + attn_mask) value, as torch's function of this name means it.

    A query that sees no key gives 0 and no gradient, as in torch 2.14 (some older versions gave NaN).

    Args:
        query: (..., H, T_q, D), float32, bfloat16 or float16. D from 1 to 256.
        key: (..., H, T_k, D).
        value: (..., H, T_k, Dv). All dimensions but the last two broadcast against each other.
        attn_mask: broadcast to (..., H, T_q, T_k): bool, True where a query sees, or added to the scores. One
            that requires a gradient gets it.
        dropout_p: the share of probabilities that is dropped, below 1, its seed drawn from torch's default
            generator.
        is_causal: a query sees no key behind its own place; the first query stands at the first key.
        scale: D ** -0.5 where None.
        enable_gqa: key and value may have fewer heads, H_kv, as long as H is a multiple of H_kv.

    Returns:
        out: (..., H, T_q, Dv), query's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or is_causal comes with a mask.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise ValueError(f"{_OP}: {name} must be a tensor (..., T, D), got {checks.shape(x)}")
    if is_causal and attn_mask is not None:
        raise ValueError(f"{_OP}: attn_mask must be None where is_causal=True, got {checks.shape(attn_mask)}")
    # Heads are the third dimension from behind; with enable_gqa they do not broadcast.
    own = 3 if enable_gqa and min(x.dim() for x in (query, key, value)) > 2 else 2
    try:
        leading = torch.broadcast_shapes(*(x.shape[:-own] for x in (query, key, value)))
    except RuntimeError:
        got = ", ".join(str(tuple(x.shape[:-own])) for x in (query, key, value))
        hint = "" if enable_gqa else " (enable_gqa=True admits fewer heads)"
        rule = f"must broadcast in all but the last {own} dimensions{hint}"
        raise ValueError(f"{_OP}: query, key and value {rule}, got {got}") from None
    q, k, v = (x.expand(*leading, *x.shape[-own:]) for x in (query, key, value))
    batch = q.shape[:-3]
    bias = mask = None
    if attn_mask is not None:
        mask = _mask(attn_mask, (*q.shape[:-1], k.shape[-2]))
    if mask is not None and mask.requires_grad:
        bias, mask = mask, mask.detach() != -torch.inf  # a row of -inf alone gives 0, not NaN
    out = attention(
        *(_four(x) for x in (q, k, v)),
        causal=is_causal,
        top_left=is_causal,
        bias=bias,
        mask=mask,
        dropout_p=dropout_p,
        scale=scale,
    )
    return out.reshape(*batch, *q.shape[-3:-1], v.shape[-1])


def _four(x):
    """x with four dimensions: leading ones are added, or folded into the batch."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _mask(mask, sizes):
    """A mask that broadcasts to the four dimensions that _four leaves of sizes."""
    if not checks.broadcasts(mask, sizes):
        raise ValueError(
            f"{_OP}: attn_mask must broadcast to (..., H, T_q, T_k) = {sizes}, got {checks.shape(mask)}"
        )
    if mask.dim() > 3 and len(sizes) > 4 and max(mask.shape[:-3]) > 1:
        mask = mask.expand(*sizes[:-3], *mask.shape[-3:])
    return _four(mask)
