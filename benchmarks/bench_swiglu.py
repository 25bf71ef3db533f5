"""SwiGLU and GEGLU at the sizes of Llama's MLPs, of two tensors and of a packed one, against PyTorch."""

import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, RECORDED, TRAINING, Case, Goal
from lspm_kernels.ops import swiglu as table

LARGE, SMALL = ((2048, 5632), (1024, 11008)), ((1, 768),)
GPU_SHAPES = ((16384, 5632), (8192, 14336), SMALL[0])
# Tensors that any forward and any backward must read and write, and operations on an element.
TENSORS, OPERATIONS = (3, 5), (20, 30)
EXTRA_MICROSECONDS = {FORWARD: 5.0, RECORDED: 12.0}  # of a call on one row
ROOF_PERCENT = 83.0  # 1.2 times what memory takes


def packed(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# Our function, PyTorch's, and how many inputs there are.
OPS = {
    "swiglu": (lspm_kernels.swiglu, lambda gate, up: F.silu(gate) * up, 2),
    "swiglu_packed": (lspm_kernels.swiglu, packed, 1),
    "geglu": (lspm_kernels.geglu, lambda gate, up: F.gelu(gate) * up, 2),
}


def case(op: str, mode: str, dtype: torch.dtype, rows: int, cols: int) -> Case:
    large, passes = (rows, cols) not in SMALL, 1 + (mode == TRAINING)
    ours, torchs, inputs = OPS[op]
    goals = (Goal("roof", ROOF_PERCENT),) if large else ()
    if not large and mode in EXTRA_MICROSECONDS:
        goals = (Goal("extra_us", EXTRA_MICROSECONDS[mode]),)
    return Case(
        op, mode, dtype, f"{rows}x{cols}",
        lambda: [torch.randn(rows, 2 * cols // inputs).to(dtype) for _ in range(inputs)], table, ours,
        {"torch": torchs}, bytes=sum(TENSORS[:passes]) * rows * cols * dtype.itemsize,
        flops=sum(OPERATIONS[:passes]) * rows * cols, roof="copy" if large else None, goals=goals,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    large = ((33, 256),) if smoke else LARGE
    for op, dtype in itertools.product(OPS, (torch.float32, torch.bfloat16)):
        for mode in (FORWARD, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in large)
        for mode in (FORWARD, RECORDED, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in SMALL)


def gpu_cases() -> Iterator[Case]:
    for op, mode in itertools.product(OPS, (FORWARD, TRAINING)):
        yield from (case(op, mode, torch.bfloat16, *shape) for shape in GPU_SHAPES)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_swiglu(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("swiglu", __doc__, cases, gpu_cases=gpu_cases))
