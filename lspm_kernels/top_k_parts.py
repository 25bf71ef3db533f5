"""The CUDA kernel of top_k_scores with its scratch, and exclusions as the kernels of a GPU read them."""

import torch

from lspm_kernels import compiled

_MANY, _FEW = 64, 16  # queries of a block (csrc/cuda/top_k_scores.cu)
_MOST_OF_MANY = 64  # k, for which rooms of so many queries fit
_FEWEST_ITEMS = 1024  # of a part, so that joining it costs little beside reading them
_MOST_PARTS = 64


def in_order(indptr, indices):
    """The lists of all queries at once: by item, then, stably, by the list that each place is of."""
    place = torch.arange(len(indices), device=indices.device)
    rows = torch.searchsorted(indptr, place, right=True)
    order = indices.argsort(stable=True)
    return indices[order[rows[order].argsort(stable=True)]]


def parts(queries: int, items: int, k: int, multiprocessors: int) -> int:
    """Among how many blocks the items are divided, so that two blocks for each multiprocessor have work."""
    of_block = _MANY if queries > _FEW and k <= _MOST_OF_MANY else _FEW
    idle = 2 * multiprocessors // max(1, -(-queries // of_block))
    return max(1, min(idle, _MOST_PARTS, items // _FEWEST_ITEMS))


def top_k_scores_forward(queries, items, item_bias, exclude_indptr, exclude_indices, scores, indices):
    """The CUDA kernel top_k_scores_forward; arguments as the op's rows take them."""
    if exclude_indptr is not None:
        exclude_indices = in_order(exclude_indptr, exclude_indices)
    count, k = scores.shape
    divided = parts(count, len(items), k, multiprocessors(queries.device))
    scratch = indices.new_empty(divided, count, k) if divided > 1 else None
    compiled.cuda.top_k_scores_forward(
        queries, items, item_bias, exclude_indptr, exclude_indices, scores, indices, 0, scratch
    )


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
