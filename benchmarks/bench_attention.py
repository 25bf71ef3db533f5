"""Causal attention, against PyTorch's scaled_dot_product_attention."""

import sys
from collections.abc import Callable, Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case
from lspm_kernels.ops import attention as table

SHAPES = ((8, 12, 256, 64), (4, 12, 1024, 64), (1, 12, 4096, 64))  # B, H, T, D
# Products of T x T x D that a causal kernel computes half of: q k^T and p v; in the backward pass those of
# dv, dp, dq and dk, and q k^T once more, as no kernel that tiles keeps it.
PRODUCTS = {FORWARD: 2, TRAINING: 2 + 5}
# Tensors of q's size that move: q, k, v and the output; backward those, the output's gradient and three more.
TENSORS = {FORWARD: 4, TRAINING: 4 + 8}


def ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return lspm_kernels.attention(q, k, v, causal=True, backend=backend)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def last_head(tensor: Tensor) -> Tensor:
    """The oracle computes one head: heads do not touch each other, and a T x T matrix in float64 is large."""
    return tensor[-1:, -1:]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape).to(dtype) for _ in range(3)]


def case(mode: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    batch, heads, tokens, size = shape
    name = f"B{batch}-H{heads}-T{tokens}-D{size}"
    elements = batch * heads * tokens * size
    return Case(
        "attention", mode, dtype, name, inputs(shape, dtype), table, ours, {"torch": sdpa},
        bytes=TENSORS[mode] * elements * dtype.itemsize, flops=PRODUCTS[mode] * elements * tokens,
        roof="matmul", part=last_head, compiled=False,  # for the compiler, SDPA is one call
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for mode in (FORWARD, TRAINING):
            yield from (case(mode, dtype, shape) for shape in (((2, 2, 40, 64),) if smoke else SHAPES))


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_attention(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("attention", __doc__, cases))
