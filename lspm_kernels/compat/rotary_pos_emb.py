"""Rotary position embedding as transformers has it: a table of angles of each sequence."""

import torch
from torch import Tensor

from lspm_kernels.ops.rotary import rotary


def rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) and k (B, H_kv, T, D), rotated by `pairs` columns of cos, sin (1 or B, T, R)."""
    # Sequences of other positions lie one behind the other in one table.
    starts = None if len(cos) == 1 else torch.arange(len(cos), device=q.device) * cos.shape[1]
    tables = [(t if t.dtype == q.dtype else t.float())[..., :pairs].flatten(0, 1) for t in (cos, sin)]
    return tuple(rotary(x, *tables, offsets=starts) for x in (q, k))
