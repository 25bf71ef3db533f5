"""Embedding bags of 20 rows of a large table, and their dense gradient, against PyTorch's own."""

import functools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case
from lspm_kernels.ops import embedding_bag as table

LENGTH, DIM = 20, 64
BATCHES = (2048, 16384)
ROWS = {FORWARD: 1_000_000, TRAINING: 100_000}  # a dense gradient is as large as its table
KINDS = ("uniform", "zipf")


@functools.cache
def indices(rows: int, bags: int, kind: str, device: torch.device, seed: int = 0) -> Tensor:
    """(bags, LENGTH): uniform, or of Zipf's law with exponent 1.05, most frequent first."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.randint(rows, (bags, LENGTH), generator=generator).to(device)
    share = torch.arange(1, rows + 1, dtype=torch.float64).pow(-1.05).cumsum(0)
    drawn = torch.rand(bags, LENGTH, generator=generator, dtype=torch.float64) * share[-1]
    return torch.searchsorted(share, drawn).clamp(max=rows - 1).to(device)


@functools.cache
def distinct(rows: int, count: int, kind: str) -> int:
    """How many rows so many indices are of, on average."""
    share = torch.arange(1, rows + 1, dtype=torch.float64).pow(-1.05 if kind == "zipf" else 0.0)
    return round(float((1 - (1 - share / share.sum()).pow(count)).sum()))


def torchs(weight: Tensor, bags: int, kind: str) -> Tensor:
    return F.embedding_bag(indices(weight.shape[0], bags, kind, weight.device), weight, mode="sum")


def ours(weight: Tensor, bags: int, kind: str, **options) -> Tensor:
    taken = indices(weight.shape[0], bags, kind, weight.device)
    return lspm_kernels.embedding_bag(weight, taken, **options)


def case(mode: str, dtype: torch.dtype, rows: int, bags: int, kind: str) -> Case:
    # Rows of the table that stand in bags are read from memory once, and the backward writes a whole table;
    # what is met again comes from a cache.
    hit = distinct(rows, bags * LENGTH, kind)
    moved = (hit + bags) * DIM * dtype.itemsize + 8 * bags * LENGTH
    if mode == TRAINING:
        moved += (rows + bags) * DIM * dtype.itemsize + 8 * bags * LENGTH
    return Case(
        "embedding_bag", mode, dtype, f"{rows}x{DIM}-B{bags}-{kind}",
        lambda: [torch.randn(rows, DIM).to(dtype)], table, functools.partial(ours, bags=bags, kind=kind),
        {"torch": functools.partial(torchs, bags=bags, kind=kind)}, bytes=moved,
        flops=bags * LENGTH * DIM * (1 if mode == FORWARD else 2), compiled=False,
        roof="read" if mode == FORWARD else "copy",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for mode in (FORWARD, TRAINING):
        for dtype in (torch.float32, torch.bfloat16):
            for bags in (4,) if smoke else BATCHES:
                for kind in KINDS:
                    yield case(mode, dtype, 50 if smoke else ROWS[mode], bags, kind)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_embedding_bag(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("embedding_bag", __doc__, cases))
