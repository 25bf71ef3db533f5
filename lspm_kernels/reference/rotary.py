"""Rotary position embedding in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor | None = None,
) -> Tensor:
    """Rotates each pair (a, b) of a row to (a cos - b sin, b cos + a sin), in float32 at least.

    Row t of sequence s reads row offsets[s] + t of cos and sin.
    """
    B, _, T, _ = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(T, device=x.device)
    if isinstance(offsets, Tensor):
        positions = offsets[:, None] + steps  # (B, T)
    else:
        positions = (steps + (offsets or 0)).expand(B, T)
    # index_select, as indexing would take a position below 0 from the end of the table
    half = cos.shape[1]
    cos, sin = (t.to(wide).index_select(0, positions.reshape(-1)).view(B, 1, T, half) for t in (cos, sin))
    turned, passed = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), passed), -1)
