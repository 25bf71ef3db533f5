"""Batch norm, residual addition and ReLU at the shapes of ResNet-50, against three ops of PyTorch."""

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
from lspm_kernels.ops import batch_norm_act as table

LARGE = (
    (8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7),
)  # fmt: skip
GPU_LARGE = ((128, 64, 112, 112), (128, 256, 56, 56), (128, 1024, 14, 14))
SMALL = ((2, 64, 4, 4),)  # where the overhead of a call is timed
# Tensors of x's size that must be read and written, and operations on an element: training takes statistics,
# normalises, sums twice, and computes the gradient.
TENSORS = {FORWARD: 3, TRAINING: 1 + 3 + 4 + 3}
OPERATIONS = {FORWARD: 5, TRAINING: 4 + 5 + 6 + 6}


@functools.cache
def running(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: str, training: bool) -> Tensor:
    known = weight, bias, *running(x.shape[1], weight.dtype, x.device)
    options = {"residual": residual, "activation": "relu", "training": training, "backend": backend}
    return lspm_kernels.batch_norm_act(x, *known, **options)


def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    known = running(x.shape[1], weight.dtype, x.device)
    return F.relu(F.batch_norm(x, *known, weight, bias, training) + residual)


def case(mode: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    elements = torch.Size(shape).numel()
    training = mode == TRAINING

    def inputs() -> list[Tensor]:
        images = torch.randn(2, *shape).to(dtype).unbind()
        laid = [t.contiguous(memory_format=torch.channels_last) for t in images]
        return [*laid, *torch.randn(2, shape[1]).unbind()]

    return Case(
        "batch_norm_act", mode, dtype, "x".join(map(str, shape)), inputs, table,
        functools.partial(ours, training=training), {"torch": functools.partial(torchs, training=training)},
        bytes=TENSORS[mode] * elements * dtype.itemsize, flops=OPERATIONS[mode] * elements,
        roof=None if shape in SMALL else "copy",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = (((2, 40, 9, 7),) if smoke else LARGE) + SMALL
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), (FORWARD, TRAINING)):
        yield from (case(mode, dtype, shape) for shape in shapes)


def gpu_cases() -> Iterator[Case]:
    for mode in (FORWARD, TRAINING):
        yield from (case(mode, torch.bfloat16, shape) for shape in GPU_LARGE)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_batch_norm_act(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("batch_norm_act", __doc__, cases, gpu_cases=gpu_cases))
