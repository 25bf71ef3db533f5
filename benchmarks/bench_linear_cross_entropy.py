"""A linear layer and its cross entropy, from hidden states to gradients, against PyTorch's own."""

import functools
import sys
from collections.abc import Callable, Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case, Goal
from lspm_kernels.ops import linear_cross_entropy as table

GPT2, FEW = (1024, 768, 50257), 256  # rows, features, classes; rows whose logits are kept in bfloat16
LLAMA3 = (8192, 4096, 128256)  # for a GPU
PRODUCTS = {FORWARD: 1, TRAINING: 3}
SPEEDUP = {torch.float32: 10.0, torch.bfloat16: 3.0}


@functools.cache
def classes(rows: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(count, (rows,), generator=torch.Generator().manual_seed(0)).to(device)


def of(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, **options) -> Tensor:
    """The loss, in hidden's dtype as torch gives it."""
    target = classes(len(hidden), len(weight), hidden.device)
    return function(hidden, weight, target, **options).to(hidden.dtype)


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, parts: int | None) -> Tensor:
    """By torch's own choice of a chunk, or in so many parts."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=parts and len(hidden) // parts)
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def case(mode: str, dtype: torch.dtype, rows: int, dim: int, count: int) -> Case:
    # Of 1 to 16 parts 1 and 2 are the fastest on a CPU, alike: in 1 all logits are there at once.
    parts = {"torch chunked": None, "torch 2 chunks": 2}
    baselines = {name: functools.partial(of, chunked, parts=count) for name, count in parts.items()}
    goals = (Goal("speedup", SPEEDUP[dtype]), *(Goal(name, 1.2) for name in baselines))
    return Case(
        "linear_cross_entropy", mode, dtype, f"{rows}x{dim}x{count}",
        lambda: [torch.randn(rows, dim).to(dtype), (torch.randn(count, dim) / dim**0.5).to(dtype)], table,
        functools.partial(of, lspm_kernels.linear_cross_entropy),
        {"torch": functools.partial(of, eager)} | baselines,
        bytes=(rows + count) * dim * dtype.itemsize * (1 if mode == FORWARD else 2),
        flops=2 * rows * dim * count * PRODUCTS[mode], roof="matmul",
        goals=goals if mode == TRAINING and rows != FEW else (),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for mode in (TRAINING, FORWARD):
        for dtype in (torch.float32, torch.bfloat16):
            yield case(mode, dtype, *((6, 8, 70) if smoke else GPT2))
    if not smoke:
        yield case(TRAINING, torch.bfloat16, FEW, *GPT2[1:])


def gpu_cases() -> Iterator[Case]:
    for mode in (TRAINING, FORWARD):
        yield case(mode, torch.bfloat16, *LLAMA3)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_linear_cross_entropy(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("linear_cross_entropy", __doc__, cases, gpu_cases=gpu_cases))
