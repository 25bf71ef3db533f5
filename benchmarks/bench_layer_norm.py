"""Layer norm, RMS norm and layer norm after a residual addition, against PyTorch's own."""

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
from lspm_kernels.ops import layer_norm as table

LARGE, SMALL = ((4096, 768), (4096, 1024), (4096, 4096)), ((1, 768), (64, 768))
GPU_SHAPES = ((32768, 768), (16384, 4096), SMALL[1])


def torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


# Our function, PyTorch's, how many inputs are rows x cols and how many cols long.
OPS = {
    "layer_norm": (lspm_kernels.layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), 1, 2),
    "rms_norm": (lspm_kernels.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w), 1, 1),
    "add_layer_norm": (lspm_kernels.add_layer_norm, torch_add_layer_norm, 2, 2),
}
# Tensors of rows x cols that any forward and any backward must read and write, and operations on an element.
TENSORS = {"layer_norm": (2, 3), "rms_norm": (2, 3), "add_layer_norm": (4, 4)}
OPERATIONS = {"layer_norm": (8, 15), "rms_norm": (4, 11), "add_layer_norm": (9, 16)}
SPEEDUPS = {
    ("layer_norm", FORWARD, torch.float32): 0.95, ("layer_norm", FORWARD, torch.bfloat16): 2.0,
    ("add_layer_norm", TRAINING, torch.float32): 1.8, ("add_layer_norm", TRAINING, torch.bfloat16): 2.0,
}  # fmt: skip
EXTRA_MICROSECONDS = {FORWARD: 5.0, RECORDED: 12.0}  # of a call on one row
ROOF_PERCENT = 85.0


def case(op: str, mode: str, dtype: torch.dtype, rows: int, cols: int) -> Case:
    ours, torchs, tensors, vectors = OPS[op]
    shapes = [(rows, cols)] * tensors + [(cols,)] * vectors
    large = (rows, cols) not in SMALL
    goals = [Goal("roof", ROOF_PERCENT)] if large else []
    if large and (op, mode, dtype) in SPEEDUPS:
        goals.append(Goal("speedup", SPEEDUPS[op, mode, dtype]))
    if rows == 1 and mode in EXTRA_MICROSECONDS:
        goals.append(Goal("extra_us", EXTRA_MICROSECONDS[mode]))
    passes = 1 + (mode == TRAINING)
    return Case(
        op, mode, dtype, f"{rows}x{cols}", lambda: [torch.randn(shape).to(dtype) for shape in shapes],
        table, ours, {"torch": torchs}, bytes=sum(TENSORS[op][:passes]) * rows * cols * dtype.itemsize,
        flops=sum(OPERATIONS[op][:passes]) * rows * cols, roof="copy" if large else None, goals=tuple(goals),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    large, small = (((33, 256),), SMALL[:1]) if smoke else (LARGE, SMALL)
    for op, dtype in itertools.product(OPS, (torch.float32, torch.bfloat16)):
        for mode in (FORWARD, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in large)
        for mode in (FORWARD, RECORDED, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in small)


def gpu_cases() -> list[Case]:
    kinds = itertools.product(OPS, (FORWARD, TRAINING), GPU_SHAPES)
    return [case(op, mode, torch.bfloat16, *shape) for op, mode, shape in kinds]


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_layer_norm(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("layer_norm", __doc__, cases, gpu_cases=gpu_cases))
