"""Convolution, batch norm, ReLU and residual of ResNet-50 in training, against PyTorch's own modules."""

import sys
from collections.abc import Iterator
from functools import partial

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import TRAINING, Case
from lspm_kernels.ops import conv2d_batch_norm as table

# Channels, filters, kernel, rows and columns of x, stride: what ends a block, or stands in its middle.
SHAPES = (
    (64, 64, 3, 56, 1), (64, 256, 1, 56, 1), (128, 128, 3, 28, 1), (128, 512, 1, 28, 1),
    (256, 256, 3, 14, 1), (256, 1024, 1, 14, 1), (512, 512, 3, 7, 1), (512, 2048, 1, 7, 1),
)  # fmt: skip
LAST = torch.channels_last


def torchs(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, *, stride: int
) -> Tensor:
    y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    return F.relu(F.batch_norm(y, None, None, scale, shift, training=True) + residual)


def ours(x, weight, scale, shift, residual, *, stride: int, backend=None) -> Tensor:
    return lspm_kernels.conv2d_batch_norm(
        x, weight, scale, shift, None, None, stride, weight.shape[-1] // 2, residual=residual,
        activation="relu", training=True, backend=backend,
    )  # fmt: skip


def case(dtype: torch.dtype, batch: int, shape: tuple[int, ...]) -> Case:
    channels, filters, kernel, size, stride = shape
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    images = (batch, channels, size, size), (filters, channels, kernel, kernel), (batch, filters, out, out)

    def inputs() -> list[Tensor]:
        x, weight, residual = (torch.randn(s) for s in images)
        residual += 16 * residual.sign()  # at ReLU's kink, rounding decides what the gradient is
        x, weight, residual = (t.to(dtype).contiguous(memory_format=LAST) for t in (x, weight, residual))
        weight /= (channels * kernel**2) ** 0.5
        return [x, weight, torch.rand(filters) + 0.5, torch.randn(filters), residual]

    pixels = batch * out**2
    name = f"B{batch}-{channels}-{filters}-k{kernel}-{size}-s{stride}"
    return Case(
        "conv2d_batch_norm", TRAINING, dtype, name, inputs, table, partial(ours, stride=stride),
        {"torch": partial(torchs, stride=stride)}, roof="matmul",
        bytes=dtype.itemsize * 3 * (batch * channels * size**2 + 4 * pixels * filters),
        flops=6 * pixels * filters * channels * kernel**2,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes, batch = (((16, 24, 3, 9, 1),), 2) if smoke else (SHAPES, 8)
    for dtype in (torch.float32, torch.bfloat16):
        yield from (case(dtype, batch, shape) for shape in shapes)


def gpu_cases() -> Iterator[Case]:
    yield from (case(torch.bfloat16, 128, shape) for shape in SHAPES)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_conv2d_batch_norm(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("conv2d_batch_norm", __doc__, cases, gpu_cases=gpu_cases))
