"""Linear in plain PyTorch, of weights in floating point or in integers with scales."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dequantized(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight (N, K) in dtype: of integers, times the scales (N, G) of G groups of a row's columns."""
    if scales is None:
        return weight.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    (N, K), G = weight.shape, scales.shape[1]
    groups = weight.to(wide).view(N, G, K // G) * scales.to(wide)[:, :, None]
    return groups.view(N, K).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    """x @ weight.T + bias, in float32 at least, rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), dequantized(weight, scales, wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)
