"""Linear of many rows, with its gradients, at the sizes of GPT-2 and of BERT, against PyTorch's own."""

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
from lspm_kernels.ops import linear as table

# Rows, inputs, outputs.
SHAPES = ((1024, 768, 2304), (1024, 768, 768), (1024, 3072, 768), (64, 768, 3072))


def ours(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    return lspm_kernels.linear(x, weight, bias)  # no row of the table, but a product of many rows


def case(mode: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Case:
    def tensors() -> list[Tensor]:
        shapes = (rows, inputs), (outputs, inputs), (outputs,)
        return [torch.randn(shape).to(dtype) for shape in shapes]

    return Case(
        "linear_many_rows", mode, dtype, f"{rows}x{inputs}-to-{outputs}", tensors, table, ours,
        {"torch": F.linear}, bytes=dtype.itemsize * (rows * (inputs + outputs) + outputs * inputs),
        flops=2 * rows * inputs * outputs * (1 if mode == FORWARD else 3), roof="matmul",
        compiled=False,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((40, 48, 56),) if smoke else SHAPES
    kinds = itertools.product((torch.float32, torch.bfloat16), (FORWARD, TRAINING), shapes)
    yield from (case(mode, dtype, *shape) for dtype, mode, shape in kinds)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases(smoke=True)))
def test_linear_many_rows(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("linear_many_rows", __doc__, cases))
