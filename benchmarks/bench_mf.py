"""Ratings of a million pairs over tables of MovieLens-20M's shape, against the same in PyTorch."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case
from lspm_kernels.ops import mf as table

LARGE, SMALL = (138_493, 26_744, 64, 1_000_000), (7, 9, 5, 20)  # users, items, factors, pairs


_drawn: dict[tuple, tuple[Tensor, Tensor]] = {}  # a dict, as torch.compile looks into no functools.cache


def ids(users: int, items: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some users and items are drawn much more often than others."""
    key = users, items, pairs, device
    if key not in _drawn:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(2, pairs, generator=generator) ** 3 * torch.tensor([[users], [items]])
        _drawn[key] = tuple(drawn.long().to(device))
    return _drawn[key]


def ours(*tables: Tensor, backend: str, pairs: int) -> Tensor:
    u, i, user_bias, item_bias = tables
    options = {"user_bias": user_bias, "item_bias": item_bias, "mean": 3.5, "backend": backend}
    return lspm_kernels.mf(u, i, *ids(len(u), len(i), pairs, u.device), **options)


def in_torch(u: Tensor, i: Tensor, user_bias: Tensor, item_bias: Tensor, pairs: int) -> Tensor:
    users, items = ids(len(u), len(i), pairs, u.device)
    return 3.5 + user_bias[users] + item_bias[items] + (u[users] * i[items]).sum(-1)


def case(mode: str, dtype: torch.dtype, users: int, items: int, factors: int, pairs: int) -> Case:
    sizes = (users, factors), (items, factors), (users,), (items,)
    tables = (users + items) * (factors + 1) * dtype.itemsize
    rows = (
        2 * pairs * factors * dtype.itemsize
    )  # read again for the gradients, which are as large as the tables
    once = rows + pairs * (16 + dtype.itemsize)
    return Case(
        "mf", mode, dtype, f"{users}x{items}-K{factors}-n{pairs}",
        lambda: [torch.randn(size).to(dtype) for size in sizes], table,
        functools.partial(ours, pairs=pairs), {"torch": functools.partial(in_torch, pairs=pairs)},
        bytes=once if mode == FORWARD else 2 * once + tables,
        flops=2 * pairs * factors * (1 if mode == FORWARD else 3), roof="read",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), (FORWARD, TRAINING)):
        yield case(mode, dtype, *(SMALL if smoke else LARGE))


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_mf(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("mf", __doc__, cases))
