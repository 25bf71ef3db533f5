"""Checks of arguments that several ops make: a message names the op, the argument, the rule and the value."""

import torch
from torch import Tensor


def shape(t: object) -> tuple[int, ...] | str:
    """What a message shows of an argument that should have been a tensor of another shape."""
    return tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__


def parameter(
    op: str, name: str, t: Tensor, cols: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises ValueError unless t holds `cols` values on x's device, in one of dtypes."""
    if not isinstance(t, Tensor) or t.dim() != 1 or t.numel() != cols:
        raise ValueError(f"{op}: {name} must be a tensor of shape ({cols},), got {shape(t)}")
    if t.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{op}: {name} must have dtype {rule}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on x's device {device}, got {t.device}")


def like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Raises ValueError unless t has x's shape and device."""
    if not isinstance(t, Tensor) or t.shape != x.shape:
        raise ValueError(f"{op}: {name} must be a tensor of x's shape {tuple(x.shape)}, got {shape(t)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")
