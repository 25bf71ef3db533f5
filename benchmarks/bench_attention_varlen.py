"""Attention of packed sequences, against PyTorch's scaled_dot_product_attention of one after the other."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case, Goal
from lspm_kernels.ops import attention_varlen as table

# Lengths, heads and dims: a batch as documents have them, and many short sentences.
PACKED = {
    "8-of-64-to-1024-H12-D64": ((64, 96, 160, 288, 416, 608, 832, 1024), 12, 64),
    "64-of-16-to-79-H12-D64": (tuple(range(16, 80)), 12, 64),
}
SMOKE = {"3-of-5-to-40-H2-D64": ((5, 17, 40), 2, 64)}
PRODUCTS = {FORWARD: 2, TRAINING: 2 + 5}  # as bench_attention.py counts them
TENSORS = {FORWARD: 4, TRAINING: 12}


@functools.cache
def starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def ours(q: Tensor, k: Tensor, v: Tensor, backend: str, lengths: tuple[int, ...]) -> Tensor:
    ends, longest = starts(lengths, q.device), max(lengths)
    return lspm_kernels.attention_varlen(q, k, v, ends, ends, longest, longest, causal=True, backend=backend)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def case(mode: str, dtype: torch.dtype, name: str, lengths: tuple[int, ...], H: int, D: int) -> Case:
    rows, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    return Case(
        "attention_varlen", mode, dtype, name, lambda: [torch.randn(rows, H, D).to(dtype) for _ in "qkv"],
        table, functools.partial(ours, lengths=lengths),
        {"torch": functools.partial(one_by_one, lengths=lengths)},
        bytes=TENSORS[mode] * rows * H * D * dtype.itemsize, flops=2 * PRODUCTS[mode] * pairs * H * D,
        goals=(Goal("speedup", 1.0),), roof="matmul", compiled=False,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), PRODUCTS):
        for name, (lengths, H, D) in (SMOKE if smoke else PACKED).items():
            yield case(mode, dtype, name, lengths, H, D)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_attention_varlen(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("attention_varlen", __doc__, cases))
