"""Sums and means of the rows of a table by bags of indices, in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor


def embedding_bag(weight: Tensor, indices: Tensor, offsets: Tensor | None = None, **options) -> Tensor:
    """Adds up rows in float32 at least, in the order of the indices; rounded to weight's dtype."""
    bag, share, count = shares(weight, indices, offsets, **options)
    rows = weight[indices.reshape(-1)] * share[:, None]
    return rows.new_zeros(count, weight.shape[1]).index_add(0, bag, rows).to(weight.dtype)


def shares(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """The bag of every index, what its row is multiplied by there, and how many bags there are."""
    n, device = indices.numel(), indices.device
    places = torch.arange(n, device=device)
    if offsets is None:
        count = indices.shape[0]
        bag = places // max(1, n // max(1, count))
    else:
        count = offsets.numel() - include_last_offset
        bag = torch.searchsorted(offsets[:count].long().contiguous(), places, right=True) - 1
    share = torch.ones(n, device=device, dtype=torch.promote_types(weight.dtype, torch.float32))
    if padding_idx is not None:
        share = share * (indices.reshape(-1) != padding_idx % weight.shape[0])
    if mode == "mean":
        share = share / share.new_zeros(count).index_add(0, bag, share).clamp(min=1)[bag]
    if per_sample_weights is not None:
        share = share * per_sample_weights.reshape(-1)
    return bag, share, count
