"""Cross entropy of classes, with and without smoothing, against PyTorch's own."""

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
from harness import FORWARD, TRAINING, Case
from lspm_kernels.ops import cross_entropy as table

LARGE = ((256, 1000), (2048, 50257))  # ImageNet, and tokens of GPT-2
GPU_LARGE = ((8192, 50257), (4096, 128256))
SMOOTHING = {"cross_entropy": 0.0, "cross_entropy_smoothed": 0.1}


@functools.cache
def classes(rows: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(count, (rows,), generator=torch.Generator().manual_seed(0)).to(device)


def of(function, logits: Tensor, smoothing: float, **options) -> Tensor:
    target = classes(*logits.shape, logits.device)
    return function(logits, target, label_smoothing=smoothing, **options)


def case(op: str, mode: str, dtype: torch.dtype, rows: int, count: int) -> Case:
    smoothing, elements = SMOOTHING[op], rows * count
    return Case(
        op, mode, dtype, f"{rows}x{count}", lambda: [torch.randn(rows, count).to(dtype)], table,
        functools.partial(of, lspm_kernels.cross_entropy, smoothing=smoothing),
        {"torch": functools.partial(of, F.cross_entropy, smoothing=smoothing)},
        bytes=elements * dtype.itemsize * (1 if mode == FORWARD else 3),
        flops=elements * (10 if mode == FORWARD else 20), roof="read" if mode == FORWARD else "copy",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((5, 33),) if smoke else LARGE
    both = (torch.float32, torch.bfloat16), (FORWARD, TRAINING)
    for op, dtype, mode in itertools.product(SMOOTHING, *both):
        yield from (case(op, mode, dtype, *shape) for shape in shapes)


def gpu_cases() -> Iterator[Case]:
    for mode in (FORWARD, TRAINING):
        yield from (case("cross_entropy", mode, torch.bfloat16, *shape) for shape in GPU_LARGE)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_cross_entropy(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("cross_entropy", __doc__, cases, gpu_cases=gpu_cases))
