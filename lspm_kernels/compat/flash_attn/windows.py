"""FlashAttention-2's window_size, as lspm_kernels.attention takes it."""

import torch
from torch import Tensor

from lspm_kernels import checks


def window_of(sides: tuple[int, int] | list[int] | Tensor) -> tuple[int | None, int | None]:
    """(left, right), with None for -1, a side without a bound.

    Raises:
        ValueError: `sides` is no pair of integers of at least -1.
    """
    if isinstance(sides, Tensor) and not torch.is_floating_point(sides):
        sides = sides.tolist()
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise ValueError(f"flash_attn_func: window_size must be a pair (left, right), got {sides!r}")
    sides = tuple(map(checks.whole, sides))
    if any(not isinstance(side, int) or side < -1 for side in sides):
        raise ValueError(f"flash_attn_func: window_size must have integers of at least -1, got {sides}")
    return tuple(None if side == -1 else side for side in sides)
