"""Matrix factorisation's prediction in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor


def mf(
    user_factors: Tensor,
    item_factors: Tensor,
    users: Tensor,
    items: Tensor,
    user_bias: Tensor | None = None,
    item_bias: Tensor | None = None,
    mean: float = 0.0,
) -> Tensor:
    """mean + user_bias[u] + item_bias[i] + <user_factors[u], item_factors[i]>, in float32 at least."""
    wide = torch.promote_types(user_factors.dtype, torch.float32)
    users, items = torch.broadcast_tensors(users.long(), items.long())
    ratings = (user_factors[users].to(wide) * item_factors[items].to(wide)).sum(-1)
    if user_bias is not None:
        ratings = ratings + user_bias[users].to(wide)
    if item_bias is not None:
        ratings = ratings + item_bias[items].to(wide)
    return (ratings + mean).to(user_factors.dtype)
