"""Checks that the ops of two factors and a sparse matrix between them share."""

import math

import torch
from torch import Tensor

from lspm_kernels import checks, checks_of_memory

_FLOATS = (torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def factors(op: str, x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless x and y are factors of one K."""
    for name, t in (("factors", x), ("other_factors", y)):
        if not isinstance(t, Tensor) or t.dim() != 2 or t.size(1) == 0:
            raise ValueError(
                f"{op}: {name} must be a tensor (rows, K) with K of at least 1, got {checks.shape(t)}"
            )
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: factors must have dtype torch.float32 or torch.float64, got {x.dtype}")
    if y.size(1) != x.size(1):
        raise ValueError(f"{op}: other_factors must have factors' K {x.size(1)}, got {y.size(1)}")
    like(op, "other_factors", y, x)


def like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Raises ValueError unless t has the dtype and the device of the factors x."""
    if t.dtype != x.dtype:
        raise ValueError(f"{op}: {name} must have factors' dtype {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on factors' device {x.device}, got {t.device}")


def entries(op: str, x: Tensor, y: Tensor, indptr: Tensor, indices: Tensor) -> None:
    """Raises ValueError unless indptr and indices are a sparse matrix of x's rows by y's."""
    rows, columns = x.size(0), y.size(0)
    if not isinstance(indptr, Tensor) or indptr.dim() != 1 or indptr.numel() != rows + 1:
        raise ValueError(f"{op}: indptr must be a tensor of shape ({rows + 1},), got {checks.shape(indptr)}")
    if not isinstance(indices, Tensor) or indices.dim() != 1:
        raise ValueError(f"{op}: indices must be a tensor of one dimension, got {checks.shape(indices)}")
    if indptr.dtype != torch.int64:
        raise ValueError(f"{op}: indptr must have dtype torch.int64, got {indptr.dtype}")
    if indices.dtype not in _INTEGERS:
        raise ValueError(f"{op}: indices must have dtype torch.int32 or torch.int64, got {indices.dtype}")
    for name, t in (("indptr", indptr), ("indices", indices)):
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on factors' device {x.device}, got {t.device}")
    if not (checks.readable(indptr) and checks.readable(indices)):
        return
    first, last = indptr[0].item(), indptr[-1].item()
    if first != 0 or last != indices.numel():
        raise ValueError(f"{op}: indptr must go from 0 to {indices.numel()}, got {first} to {last}")
    if rows and indptr.diff().min() < 0:
        row = indptr.diff().lt(0).nonzero()[0].item()
        raise ValueError(f"{op}: indptr must not decrease, got {indptr[row : row + 2].tolist()} at {row}")
    if indices.numel():
        low, high = (value.item() for value in indices.aminmax())
        if low < 0 or high >= columns:
            raise ValueError(f"{op}: indices must be from 0 to {columns - 1}, got {low if low < 0 else high}")


def values(op: str, name: str, t: Tensor, x: Tensor, count: int, *, negative: bool) -> None:
    """Raises ValueError unless t is (count,), like x, finite, and at least 0 or `negative`."""
    if not isinstance(t, Tensor) or t.dim() != 1 or t.numel() != count:
        raise ValueError(f"{op}: {name} must be a tensor of shape ({count},), got {checks.shape(t)}")
    like(op, name, t, x)
    finite(op, name, t, negative=negative)


def finite(op: str, name: str, t: Tensor, *, negative: bool) -> None:
    """Raises ValueError unless what t holds, if it can be read, is finite and at least 0 or `negative`."""
    if not t.numel() or not checks.readable(t):
        return
    low, high = (value.item() for value in t.detach().aminmax())  # NaN where any is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{op}: {name} must be finite, got {high if math.isfinite(low) else low}")
    if not negative and low < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {low}")


def changed(op: str, x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless x can change in place while y is read."""
    if not x.is_contiguous():
        raise ValueError(
            f"{op}: factors must be contiguous, as they change in place, got strides {x.stride()}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        rule = "not require a gradient while gradients are recorded: call it under torch.no_grad()"
        raise ValueError(f"{op}: what it changes must {rule}")
    checks_of_memory.apart(op, {"factors": x, "other_factors": y})
