"""The numbers that a sample is drawn by, from operations that IEEE 754 rounds in one way."""

import torch
from torch import Tensor

from lspm_kernels.reference.philox_words import words_of

_LOG = (-0.1151461, 0.116769987, -0.12420141, 0.14249323, -0.16668058, 0.200007148, -0.24999994, 0.3333333)


def exp(x: Tensor) -> Tensor:
    """e ** x of x up to 0, as csrc/cpu/exact.h has it; 0 where that is below 1.25 * 2 ** -40."""
    n, p = (x.clamp(min=-30) * 1.44269504).round(), 1.38368382e-3  # coefficients: simd.h
    r = x.clamp(min=-30) - n * 0.693145752 - n * 1.42860677e-6
    for c in (8.37482207e-3, 4.16682260e-2, 1.66664201e-1, 4.99999921e-1, 1.0, 1.0):
        p = p * r + c
    return torch.where(x < -27.5, 0, p * (n.int() + 127 << 23).view(torch.float32))


def exponentials(seed: Tensor, rows: int, count: int, device: torch.device) -> Tensor:
    """(rows, count) numbers -log(u), of u from (0, 1): element i takes word i / 16 % 4 of a counter."""
    row, i = torch.meshgrid(*(torch.arange(n, device=device) for n in (rows, count)), indexing="ij")
    counter = [i // 64 * 16 + i % 16, row, row >> 32, i // 64 >> 28]
    word = torch.stack(words_of(counter, seed)).gather(0, (i // 16 % 4)[None])[0]
    v = (((word >> 1).float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)
    bits = (1 - v).view(torch.int32) + 0x4AFB0D  # 1.0 - sqrt(0.5), as bits
    t = torch.where(v < 0.25, -v, ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1)
    n, p = ((bits >> 23) - 127).float(), 0.070376836
    for c in _LOG:
        p = p * t + c
    return -(t + (p * t * (t * t) - n * 2.12194440e-4 - t * t * 0.5) + n * 0.693359375)


def units_of(w: Tensor) -> Tensor:  # of 2 ** -40
    return (w * 2**40).long()


def share(total: Tensor, of: int | Tensor) -> Tensor:  # of / 2 ** 62, rounded down; total has 61 bits
    (a, b), (high, low) = ((x >> 31, x & 0x7FFFFFFF) for x in (total, of))
    return high * a + (high * b + low * a + (low * b >> 31) >> 31)
