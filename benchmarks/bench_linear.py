"""Linear for few rows of GPT-2's sizes, and a prompt, by floats and 8-bit integers, against PyTorch's own.

Beside integers PyTorch multiplies by the same weight written out in x's dtype, and where x is bfloat16 by its
own product of integers with a scale to a row.
"""

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, Case, Goal
from lspm_kernels.ops import linear as table
from lspm_kernels.reference import linear as reference

F32, BF16 = torch.float32, torch.bfloat16
SIZES = (3072, 768), (50257, 768), (4096, 4096)  # outputs and inputs
PROMPT = 32


def floats(dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> Case:
    def tensors() -> list[Tensor]:
        return [torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)]

    return Case(
        "linear", FORWARD, dtype, f"{rows}x{inputs}-to-{outputs}", tensors, table, lspm_kernels.linear,
        {"torch": F.linear}, bytes=dtype.itemsize * outputs * inputs, flops=2 * rows * outputs * inputs,
        roof="read", goals=(Goal("roof", 80),), compiled=False,
    )  # fmt: skip


def integers(dtype: torch.dtype, rows: int, outputs: int, inputs: int, group: int | None) -> Case:
    small, scales = lspm_kernels.quantize_int8(torch.randn(outputs, inputs), group)

    def tensors() -> list[Tensor]:
        written_out = reference.dequantized(small, scales, dtype)
        return [torch.randn(rows, inputs).to(dtype), small.clone(), scales.clone(), written_out]

    def ours(x: Tensor, weight: Tensor, scales: Tensor, _: Tensor, backend: str | None = None) -> Tensor:
        return lspm_kernels.linear(x, weight, scales=scales, backend=backend)

    baselines = {"torch": lambda x, weight, scales, written_out: F.linear(x, written_out)}
    if dtype == BF16 and not group:
        pack = torch.ops.aten._weight_int8pack_mm
        baselines["torch int8"] = lambda x, weight, scales, _: pack(x, weight, scales[:, 0].to(dtype))
    kind = f"int8-groups-of-{group}" if group else "int8"
    return Case(
        "linear", FORWARD, dtype, f"{kind}-{rows}x{inputs}-to-{outputs}", tensors, table, ours, baselines,
        bytes=outputs * inputs + scales.nbytes, flops=2 * rows * outputs * inputs,
        roof="matmul" if rows == PROMPT else "read", goals=() if rows == PROMPT else (Goal("roof", 80),),
        compiled=False,
        meaning=lambda x, weight, scales, _: reference.linear(x, weight, None, scales),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    sizes, rows = (((50, 64),), (2,)) if smoke else (SIZES, (1, 4, 8))
    makers = floats, partial(integers, group=None), partial(integers, group=32)
    for make, dtype, size, count in itertools.product(makers, (F32, BF16), sizes, rows):
        if count == 1 or size == sizes[-1]:
            yield make(dtype, count, *size)
    yield integers(F32, PROMPT, *sizes[0], group=32)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases(smoke=True)))
def test_linear(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("linear", __doc__, cases))
