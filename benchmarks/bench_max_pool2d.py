"""Max pooling of channels-last images, against PyTorch's own."""

import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
import torch.nn.functional as F

import lspm_kernels
from harness import FORWARD, TRAINING, Case
from lspm_kernels.ops import max_pool2d as table

LARGE = ((8, 64, 112, 112),)  # the stem of a ResNet, under windows of 3, stride 2 and padding 1
WINDOW = (3, 2, 1)


def case(mode: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    x = torch.Size(shape).numel()
    y = x // shape[2] // shape[3] * -(-shape[2] // 2) * -(-shape[3] // 2)
    moved = (x + y) * dtype.itemsize  # the backward also reads a byte for each element of y
    return Case(
        "max_pool2d", mode, dtype, "N{}-C{}-{}x{}".format(*shape),
        lambda: [torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)], table,
        lambda x, backend: lspm_kernels.max_pool2d(x, *WINDOW, backend=backend),
        {"torch": lambda x: F.max_pool2d(x, *WINDOW)},
        bytes=moved if mode == FORWARD else 2 * (moved + y), flops=9 * y * (1 if mode == FORWARD else 2),
        roof="copy",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((2, 20, 9, 11),) if smoke else LARGE
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), (FORWARD, TRAINING)):
        yield from (case(mode, dtype, shape) for shape in shapes)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_max_pool2d(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("max_pool2d", __doc__, cases))
