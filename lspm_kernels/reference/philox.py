"""Philox4x32-10 in plain PyTorch: dropout keeps what has a 32-bit word not below p * 2 ** 32."""

import math

import torch
from torch import Tensor

from lspm_kernels.reference.philox_words import words_of

_LOW = 0xFFFFFFFF


def kept(seed: int, p: float, batches: range, H: int, T_q: int, T_k: int, device: torch.device) -> Tensor:
    """(batches, H, T_q, T_k): that of (b, h, i, j) has the counter (j // 64 * 16 + j % 16, i, h, b)."""
    b, h, i, j = (torch.arange(n, device=device) for n in (len(batches), H, T_q, T_k))
    b, h, i, j = torch.meshgrid(b + batches.start, h, i, j, indexing="ij")
    return _kept(seed, p, j, [j // 64 * 16 + j % 16, i, h, b])


def kept_of(seed: int, p: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of this shape: element i, row by row, has (c, 0, 0, c >> 32), c = i // 64 * 16 + i % 16."""
    i = torch.arange(math.prod(shape), device=device)
    c = i // 64 * 16 + i % 16
    return _kept(seed, p, i, [c & _LOW, 0 * i, 0 * i, c >> 32]).reshape(shape)


def _kept(seed, p, j, counters):
    """By word j // 16 % 4 of each counter."""
    word = torch.stack(words_of(counters, seed)).gather(0, (j // 16 % 4)[None])[0]
    return word >= min(int(p * 2**32), _LOW)
