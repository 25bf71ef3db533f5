"""Batch norm with a residual addition and an activation behind it, in plain PyTorch: what kernels compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of csrc/activation.h.
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu}


def batch_norm_act(
    x, weight=None, bias=None, running_mean=None, running_var=None, *,
    residual=None, activation=None, training=False, momentum=0.1, eps=1e-5,
) -> Tensor:  # fmt: skip
    """y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual), in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    column = (-1, *[1] * (x.dim() - 2))  # the shape of a channel's number beside x
    if training or running_mean is None:
        variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        if running_mean is not None:
            update(running_mean, running_var, mean, variance, x.numel() // x.shape[1], momentum)
    else:
        mean, variance = running_mean.to(wide.dtype), running_var.to(wide.dtype)
    y = (wide - mean.view(column)) * torch.rsqrt(variance + eps).view(column)
    if weight is not None:
        y = y * weight.view(column)
    if bias is not None:
        y = y + bias.view(column)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y).to(x.dtype)


@torch.no_grad()
def update(running_mean, running_var, mean: Tensor, variance: Tensor, count, momentum: float) -> None:
    """running += momentum * (new - running), in place; the new variance without its bias."""
    for running, new in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
        running.copy_(running.to(new.dtype).lerp(new, momentum))
