"""The best items of each query in plain PyTorch, by way of all scores: what the kernels compute."""

import torch
from torch import Tensor


def top_k_scores(
    queries: Tensor,
    items: Tensor,
    k: int,
    item_bias: Tensor | None = None,
    exclude_indptr: Tensor | None = None,
    exclude_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first k of a stable sort of queries @ items.T + item_bias, NaN first, without what is excluded."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ items.to(wide).T
    if item_bias is not None:
        scores = scores + item_bias.to(wide)
    excluded = torch.zeros_like(scores, dtype=torch.bool)
    if exclude_indptr is not None:
        rows = torch.arange(len(queries), device=queries.device).repeat_interleave(exclude_indptr.diff())
        excluded[rows, exclude_indices[exclude_indptr[0] : exclude_indptr[-1]].long()] = True
    order = scores.sort(dim=1, descending=True, stable=True).indices
    last = excluded.gather(1, order).sort(dim=1, stable=True)  # what is excluded comes after all others
    indices = order.gather(1, last.indices).masked_fill(last.values, -1)[:, :k]
    indices = torch.cat([indices, indices.new_full((len(queries), k - indices.shape[1]), -1)], 1)
    if not len(items):
        return scores.new_full(indices.shape, -torch.inf), indices
    scores = scores.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)
    return scores, indices
