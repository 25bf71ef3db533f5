"""The CUDA kernels of mf_als with the Gram matrices that implicit objectives have of all rows."""

import torch

from lspm_kernels import compiled

_PARTS = 1024  # csrc/mf_als.h, kMfAlsLossParts


def mf_als_update(factors, other_factors, *entries_and_options):
    """The CUDA kernel mf_als_update; arguments as the op's rows take them."""
    implicit = entries_and_options[-2]
    gram = other_factors.T @ other_factors if implicit else None
    compiled.cuda.mf_als_update(factors, other_factors, *entries_and_options, 0, gram)


def mf_als_loss(factors, other_factors, *entries_and_options):
    """The CUDA kernel mf_als_loss; arguments as the op's rows take them."""
    implicit = entries_and_options[-1]
    grams = torch.stack([x.T @ x for x in (factors, other_factors)]) if implicit else None
    scratch = factors.new_zeros(2 * _PARTS + len(other_factors), dtype=torch.int64)
    compiled.cuda.mf_als_loss(factors, other_factors, *entries_and_options, 0, grams, scratch)
