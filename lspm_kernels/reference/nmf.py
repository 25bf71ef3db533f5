"""A multiplicative update of a non-negative factor in plain PyTorch: what the kernels compute."""

import torch


def nmf(x, y, indptr, indices, values, reg, eps):
    """x * (sum of v y) / (sum of <x, y> y + n reg x + eps), over the n entries of each row."""
    counts, chunk = indptr.diff(), 2**16
    rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), counts)
    above, below = torch.zeros_like(x), (counts * reg).to(x.dtype)[:, None] * x + eps
    for r, c, v in zip(rows.split(chunk), indices.split(chunk), values.split(chunk), strict=True):
        named = y[c.long()]
        above.index_add_(0, r, v[:, None] * named)
        below.index_add_(0, r, (x[r] * named).sum(1, keepdim=True) * named)
    return x * above / below
