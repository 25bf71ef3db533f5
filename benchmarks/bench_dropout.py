"""Dropout of GPT-2's residual stream, alone and with the residual addition, against PyTorch's."""

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
from lspm_kernels.ops import dropout as table
from lspm_kernels.reference import dropout as reference

LARGE, SMALL = ((1024, 768), (8192, 1024)), (1, 768)
GPU_SHAPES = ((8192, 1024), (32768, 4096))
P, SEED = 0.1, 1
# Tensors that any forward must read and write, and beside it any backward: the residual's gradient is dout.
TENSORS = {"dropout": (2, 2), "add_dropout": (3, 2)}
OPERATIONS = 10 * 8 / 4 + 3  # on an element: ten rounds of Philox for four, then a comparison and a product


def torchs(x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.dropout(x, P)
    return y if residual is None else residual + y


def ours(x: Tensor, residual: Tensor | None = None, **options) -> Tensor:
    return lspm_kernels.dropout(x, P, residual=residual, seed=SEED, **options)


def meaning(x: Tensor, residual: Tensor | None = None) -> Tensor:
    return reference.dropout(x, P, residual=residual, seed=SEED)


def case(op: str, mode: str, dtype: torch.dtype, rows: int, cols: int) -> Case:
    large, passes = (rows, cols) != SMALL, 1 + (mode == TRAINING)
    elements = rows * cols
    return Case(
        op, mode, dtype, f"{rows}x{cols}",
        lambda: [torch.randn(rows, cols).to(dtype) for _ in range(1 + (op == "add_dropout"))], table, ours,
        {"torch": torchs}, bytes=sum(TENSORS[op][:passes]) * elements * dtype.itemsize,
        flops=round(OPERATIONS * passes * elements), roof="copy" if large else None,
        goals=(Goal("speedup", 4.0),) if large else (), meaning=meaning,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for op, dtype in itertools.product(TENSORS, (torch.float32, torch.bfloat16)):
        for mode in (FORWARD, TRAINING):
            yield from (case(op, mode, dtype, *shape) for shape in (((33, 256),) if smoke else LARGE))
        for mode in (FORWARD, RECORDED):
            yield case(op, mode, dtype, *SMALL)


def gpu_cases() -> Iterator[Case]:
    for op, mode in itertools.product(TENSORS, (FORWARD, TRAINING)):
        yield from (case(op, mode, torch.bfloat16, *shape) for shape in GPU_SHAPES)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_dropout(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("dropout", __doc__, cases, gpu_cases=gpu_cases))
