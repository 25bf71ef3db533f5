"""The mean of each channel of channels-last images, against PyTorch's own."""

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
from lspm_kernels.ops import global_avg_pool as table

LARGE = ((8, 2048, 7, 7), (8, 512, 7, 7), (64, 512, 4, 4))  # what ResNets end with


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def case(mode: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    elements = torch.Size(shape).numel() * (1 if mode == FORWARD else 2)
    return Case(
        "global_avg_pool", mode, dtype, "N{}-C{}-{}x{}".format(*shape),
        lambda: [torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)], table,
        lspm_kernels.global_avg_pool,
        {"torch": mean, "torch adaptive": lambda x: F.adaptive_avg_pool2d(x, 1)},
        bytes=elements * dtype.itemsize, flops=elements, roof="read" if mode == FORWARD else "copy",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((2, 40, 3, 5),) if smoke else LARGE
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), (FORWARD, TRAINING)):
        yield from (case(mode, dtype, shape) for shape in shapes)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_global_avg_pool(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("global_avg_pool", __doc__, cases))
