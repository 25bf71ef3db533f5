"""Convolutions of ResNet-50 with what stands behind them, against PyTorch's own in channels_last."""

import sys
from collections.abc import Iterator
from functools import partial

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case, Goal
from lspm_kernels.ops import conv2d as table

# Channels, filters, kernel, rows and columns of x, stride: the distinct shapes of ResNet-50, and its stem.
SHAPES = (
    (64, 64, 1, 56, 1), (64, 64, 3, 56, 1), (64, 256, 1, 56, 1), (256, 64, 1, 56, 1),
    (128, 128, 3, 28, 1), (512, 128, 1, 28, 1), (256, 512, 1, 56, 2), (256, 256, 3, 14, 1),
    (1024, 256, 1, 14, 1), (512, 512, 3, 7, 1), (512, 2048, 1, 7, 1), (3, 64, 7, 224, 2),
)  # fmt: skip


def torchs(x: Tensor, weight: Tensor, scale=None, shift=None, residual=None, *, stride: int) -> Tensor:
    """What a model runs: a convolution, in evaluation followed by batch norm, an addition and ReLU."""
    y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    if scale is None:
        return y
    constants = torch.zeros_like(scale), torch.ones_like(scale)  # eps is as good as 0: torch asks for more
    return F.relu(F.batch_norm(y, *constants, scale, shift, eps=1e-30) + residual)


def ours(x, weight, scale=None, shift=None, residual=None, *, stride: int, backend=None) -> Tensor:
    return lspm_kernels.conv2d(
        x, weight, None, stride, weight.shape[-1] // 2, activation=None if scale is None else "relu",
        residual=residual, scale=scale, shift=shift, backend=backend,
    )  # fmt: skip


def case(mode: str, dtype: torch.dtype, batch: int, shape: tuple[int, ...]) -> Case:
    channels, filters, kernel, size, stride = shape
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    images = (batch, channels, size, size), (filters, channels, kernel, kernel), (batch, filters, out, out)

    def inputs() -> list[Tensor]:
        x, weight, residual = (torch.randn(s).to(dtype).to(memory_format=torch.channels_last) for s in images)
        weight /= (channels * kernel**2) ** 0.5
        epilogue = [torch.rand(filters) + 0.5, torch.randn(filters), residual]
        return [x, weight, *(epilogue if mode == FORWARD else [])]

    pixels = batch * out**2
    return Case(
        "conv2d", mode, dtype, f"B{batch}-{channels}-{filters}-k{kernel}-{size}-s{stride}", inputs, table,
        partial(ours, stride=stride), {"torch": partial(torchs, stride=stride)}, roof="matmul",
        bytes=dtype.itemsize * (batch * channels * size**2 + 2 * pixels * filters),
        flops=2 * pixels * filters * channels * kernel**2 * (1 if mode == FORWARD else 3),
        goals=(Goal("speedup", 0.95),) if mode == FORWARD else (),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes, batches = (((16, 24, 3, 9, 1),), (2,)) if smoke else (SHAPES, (8, 1))
    for dtype in (torch.float32, torch.bfloat16):
        for batch in batches:
            for mode in (FORWARD, TRAINING)[: 1 if batch == 1 else 2]:
                yield from (case(mode, dtype, batch, shape) for shape in shapes)


def gpu_cases() -> list[Case]:
    return [case(mode, torch.bfloat16, 128, shape) for mode in (FORWARD, TRAINING) for shape in SHAPES]


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_conv2d(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("conv2d", __doc__, cases, gpu_cases=gpu_cases))
