"""Layer norm and RMS norm over the last dimension, in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor


def layer_norm(x, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, in float32 at least, rounded to x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    return _scale(centered, weight, bias, eps, x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x ** 2) + eps) * weight."""
    return _scale(x.to(torch.promote_types(x.dtype, torch.float32)), weight, None, eps, x.dtype)


def add_layer_norm(x, residual, weight=None, bias=None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def add_rms_norm(x, residual, weight=None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def _scale(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(dtype)
