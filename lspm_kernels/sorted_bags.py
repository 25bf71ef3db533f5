"""What kernels of a GPU are given beside bags: the bag of every index, and indices in the order of rows."""

import torch
from torch import Tensor

_CHUNK = 32  # csrc/embedding_bag.h's kSortedChunk


def bags_of(indices: Tensor, offsets: Tensor | None, bags: int) -> Tensor:
    """The bag of each of at least one index, int32; -1 where it is in none."""
    count, device = indices.numel(), indices.device
    if offsets is None:
        return torch.arange(bags, dtype=torch.int32, device=device).repeat_interleave(count // bags)
    places = torch.arange(count, dtype=offsets.dtype, device=device)
    return torch.searchsorted(offsets[:bags], places, right=True, out_int32=True) - 1


def sorted_places(indices: Tensor, bags: int, dim: int, mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, order, shares and parts of csrc/embedding_bag.h's SortedPlaces; the last two hold nothing yet."""
    rows, order = indices.sort(stable=True)
    shares, parts = (
        torch.empty(size, dtype=torch.float32, device=indices.device)
        for size in ((bags if mean else 0,), (-(-indices.numel() // _CHUNK), 2, dim))
    )
    return rows, order, shares, parts
