"""Philox4x32-10 in plain PyTorch: dropout keeps what has a 32-bit word not below p * 2 ** 32."""

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def kept(seed: int, p: float, batches: range, H: int, T_q: int, T_k: int, device: torch.device) -> Tensor:
    """(batches, H, T_q, T_k): that of (b, h, i, j) has the counter (j // 64 * 16 + j % 16, i, h, b)."""
    b, h, i, j = (torch.arange(n, device=device) for n in (len(batches), H, T_q, T_k))
    b, h, i, j = torch.meshgrid(b + batches.start, h, i, j, indexing="ij")
    return _kept(seed, p, j, j // 64 * 16 + j % 16, i, h, b)


def kept_of(seed: int, p: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of this shape: element i, row by row, has (c, 0, 0, c >> 32), c = i // 64 * 16 + i % 16."""
    i = torch.arange(math.prod(shape), device=device)
    c = i // 64 * 16 + i % 16
    return _kept(seed, p, i, c & _LOW, 0 * i, 0 * i, c >> 32).reshape(shape)


def _kept(seed, p, j, *x):
    """By word j // 16 % 4 of the counter x under `seed`."""
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        (a, b), (c, d) = _product(x[0], 0xD2511F53), _product(x[2], 0xCD9E8D57)
        x = c ^ x[1] ^ keys[0], d, a ^ x[3] ^ keys[1], b
        keys = [keys[0] + 0x9E3779B9 & _LOW, keys[1] + 0xBB67AE85 & _LOW]
    return torch.stack(x).gather(0, (j // 16 % 4)[None])[0] >= min(int(p * 2**32), _LOW)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low half of a * b; int64 holds the product of 32 and 16 bits."""
    small, large = a * (b & 0xFFFF), a * (b >> 16)
    middle = (small >> 16) + large
    return middle >> 16, (middle & 0xFFFF) << 16 | small & 0xFFFF
