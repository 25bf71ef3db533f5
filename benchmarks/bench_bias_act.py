"""A bias and GELU between the linear layers of GPT-2 and of a larger model, against PyTorch's two ops."""

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
from harness import FORWARD, RECORDED, TRAINING, Case, Goal
from lspm_kernels.ops import bias_act as table

LARGE, SMALL = ((4096, 3072), (2048, 16384)), ((1, 768),)
GPU_SHAPES = ((32768, 3072), (16384, 16384), SMALL[0])
APPROXIMATIONS = {"bias_gelu": "none", "bias_gelu_tanh": "tanh"}
# Tensors that any forward and any backward must read and write, and operations on an element.
TENSORS, OPERATIONS = (2, 3), (22, 34)
SPEEDUPS = {"speedup": 4.0, "compile": 1.1}  # over torch's eager mode and torch.compile, with the gradient
EXTRA_MICROSECONDS = {FORWARD: 5.0, RECORDED: 12.0}  # of a call on one row
ROOF_PERCENT = 83.0  # 1.2 times what memory takes


def torchs(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def case(op: str, mode: str, dtype: torch.dtype, rows: int, cols: int) -> Case:
    large, passes = (rows, cols) not in SMALL, 1 + (mode == TRAINING)
    options = {"approximate": APPROXIMATIONS[op]}
    goals = [Goal("roof", ROOF_PERCENT)] if large else []
    if large and mode == TRAINING:
        goals += [Goal(what, bound) for what, bound in SPEEDUPS.items()]
    if not large and mode in EXTRA_MICROSECONDS:
        goals.append(Goal("extra_us", EXTRA_MICROSECONDS[mode]))
    return Case(
        op, mode, dtype, f"{rows}x{cols}",
        lambda: [torch.randn(shape).to(dtype) for shape in ((rows, cols), (cols,))], table,
        functools.partial(lspm_kernels.bias_gelu, **options), {"torch": functools.partial(torchs, **options)},
        bytes=sum(TENSORS[:passes]) * rows * cols * dtype.itemsize,
        flops=sum(OPERATIONS[:passes]) * rows * cols, roof="copy" if large else None, goals=tuple(goals),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    large = ((33, 256),) if smoke else LARGE
    for op, dtype in itertools.product(APPROXIMATIONS, (torch.float32, torch.bfloat16)):
        for mode in (FORWARD, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in large)
        for mode in (FORWARD, RECORDED, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in SMALL)


def gpu_cases() -> Iterator[Case]:
    for op, mode in itertools.product(APPROXIMATIONS, (FORWARD, TRAINING)):
        yield from (case(op, mode, torch.bfloat16, *shape) for shape in GPU_SHAPES)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_bias_act(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("bias_act", __doc__, cases, gpu_cases=gpu_cases))
