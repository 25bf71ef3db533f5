"""The best items of each user, of all items, against PyTorch's matmul and topk over chunks of users."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
from torch import Tensor

import lspm_kernels
from harness import FORWARD, Case, Goal
from lspm_kernels.ops import top_k_scores as table

ITEMS, DIM = 100_000, 64
SHAPES = ((10_000, 10), (1_000, 100), (1_000, 1_000), (1, 10))  # users, k
CHUNKS = (100, 400)  # users whose scores torch makes at once: 1/100 and 1/25 of 10,000


def ours(users: Tensor, items: Tensor, backend: str, k: int) -> Tensor:
    return lspm_kernels.top_k_scores(users, items, k, backend=backend)[0]


def in_torch(users: Tensor, items: Tensor, k: int, chunk: int) -> Tensor:
    wide = torch.promote_types(users.dtype, torch.float32)
    return torch.cat([(part @ items.T).topk(k).values for part in users.split(chunk)]).to(wide)


def meaning(users: Tensor, items: Tensor, k: int) -> Tensor:
    wide = torch.promote_types(users.dtype, torch.float32)
    return in_torch(users.to(wide), items.to(wide), k, CHUNKS[0])


def case(dtype: torch.dtype, users: int, k: int, items: int) -> Case:
    baselines = {
        f"torch {chunk}" if chunk != CHUNKS[0] else "torch": functools.partial(in_torch, k=k, chunk=chunk)
        for chunk in CHUNKS[: 2 if users > CHUNKS[0] else 1]
    }
    one, moved = users == 1, (users + items) * DIM * dtype.itemsize + users * k * 12
    return Case(
        "top_k_scores", FORWARD, dtype, f"{users}x{items}-D{DIM}-k{k}",
        lambda: [torch.randn(n, DIM).to(dtype) for n in (users, items)], table,
        functools.partial(ours, k=k), baselines, bytes=moved,
        flops=2 * users * items * DIM, roof="read" if one else "matmul",
        goals=() if one else (Goal("speedup", 2.0),), compiled=False,
        meaning=functools.partial(meaning, k=k),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((3, 2),) if smoke else SHAPES
    for dtype, (users, k) in itertools.product((torch.float32, torch.bfloat16), shapes):
        yield case(dtype, users, k, 70 if smoke else ITEMS)


def gpu_cases() -> Iterator[Case]:
    for dtype, users in itertools.product((torch.float32, torch.bfloat16), (10_000, 1)):
        yield case(dtype, users, 10, ITEMS)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_top_k_scores(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("top_k_scores", __doc__, cases, gpu_cases=gpu_cases))
