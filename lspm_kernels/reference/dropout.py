"""Dropout with a residual addition, in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor

from lspm_kernels.reference import philox


def dropout(x: Tensor, p: float = 0.5, *, residual: Tensor | None = None, seed: int = 0) -> Tensor:
    """residual + x / (1 - p) where an element is kept, else + 0; in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    kept = philox.kept_of(seed, p, x.shape, x.device)
    y = torch.where(kept, wide / (1 - p) if p < 1 else 0 * wide, 0.0)
    return (y if residual is None else residual + y).to(x.dtype)
