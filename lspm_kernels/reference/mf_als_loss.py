"""The objective of alternating least squares in plain PyTorch, without the dense matrix."""

import torch


def mf_als_loss(x, y, indptr, indices, values, weight, reg, reg_exponent, alpha, implicit):
    """What both half sweeps make smaller; implicit, the squared products of all pairs add up to a trace."""
    counts, columns = indptr.diff(), torch.bincount(indices, minlength=len(y))
    rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), counts)
    pairs = zip(rows.split(2**16), indices.split(2**16), strict=True)
    dots = torch.cat([x.new_empty(0), *((x[r] * y[c.long()]).sum(1) for r, c in pairs)])
    v = torch.ones_like(dots) if values is None else values
    if implicit:
        fit = (1 + alpha * v) * (1 - dots) ** 2 - dots**2
        total = fit.sum() + ((x.T @ x) * (y.T @ y)).sum()
    else:
        fit = (v - dots) ** 2
        total = (fit if weight is None else weight * fit).sum()
    for n, factors in ((counts, x), (columns, y)):
        total = total + reg * (n.to(x.dtype) ** reg_exponent * (factors * factors).sum(1)).sum()
    return total
