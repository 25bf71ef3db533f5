"""Ratings in blocks, where a test's tensors are: they are dealt out on the CPU."""

import torch

import lspm_kernels as lk


def rating_blocks(*columns, **options):
    """lspm_kernels.rating_blocks of tensors on any device, on torch's default device."""
    on_cpu = (c if c is None else c.cpu() for c in columns)
    return lk.rating_blocks(*on_cpu, **options).to(torch.get_default_device())
