"""The MLP of GPT-2 and a gated one, against PyTorch's linear layers and activations."""

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
from lspm_kernels.ops import mlp as table

# Rows, features, hidden features: the demo's GPT, GPT-2, and on a GPU larger ones.
SHAPES = ((2048, 256, 1024), (1024, 768, 3072))
GPU_SHAPES = ((16384, 768, 3072), (8192, 4096, 11008))


def torch_mlp(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out, bias_out)


def torch_gated_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, weight_gate)) * F.linear(x, weight_up), weight_down)


def parameters(op: str, width: int, hidden: int) -> list[Tensor]:
    into, out = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    if op == "gated_mlp":
        return [into, torch.randn_like(into) / width**0.5, out]
    return [into, torch.randn(hidden), out, torch.randn(width)]


# Our function, PyTorch's, and how many products there are.
OPS = {"mlp": (lspm_kernels.mlp, torch_mlp, 2), "gated_mlp": (lspm_kernels.gated_mlp, torch_gated_mlp, 3)}


def case(op: str, mode: str, dtype: torch.dtype, rows: int, width: int, hidden: int) -> Case:
    ours, torchs, products = OPS[op]
    work = rows * width * hidden * products

    def inputs() -> list[Tensor]:
        return [t.to(dtype) for t in (torch.randn(rows, width), *parameters(op, width, hidden))]

    return Case(
        op, mode, dtype, f"{rows}x{width}x{hidden}", inputs, table, ours, {"torch": torchs},
        bytes=(2 * rows * width + products * width * hidden) * dtype.itemsize,
        flops=2 * work * (1 if mode == FORWARD else 3), roof="matmul",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((33, 24, 40),) if smoke else SHAPES
    kinds = itertools.product(OPS, (torch.float32, torch.bfloat16), (FORWARD, TRAINING), shapes)
    yield from (case(op, mode, dtype, *shape) for op, dtype, mode, shape in kinds)


def gpu_cases() -> Iterator[Case]:
    for op, mode, shape in itertools.product(OPS, (FORWARD, TRAINING), GPU_SHAPES):
        yield case(op, mode, torch.bfloat16, *shape)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_mlp(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("mlp", __doc__, cases, gpu_cases=gpu_cases))
