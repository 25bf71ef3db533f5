"""Attention, causal and whole, against PyTorch's scaled_dot_product_attention."""

import sys
from collections.abc import Iterator
from functools import partial

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case, Goal
from lspm_kernels.ops import attention as table

# B, H, H_kv, T, D
SHAPES = ((8, 12, 12, 256, 64), (4, 12, 12, 1024, 64), (1, 12, 12, 4096, 64), (2, 16, 4, 2048, 128))
GPU_SHAPES = ((8, 16, 16, 4096, 64), (4, 16, 16, 4096, 128), (2, 32, 8, 8192, 128), (32, 12, 12, 1024, 64))
# Products of T_q x T_k x D: q k^T and p v; in the backward pass those of dv, dp, dq and dk, and q k^T once
# more, as no kernel that tiles keeps it. Tensors of q's and of k's size that move: backward with gradients.
PRODUCTS = {FORWARD: 2, TRAINING: 2 + 5}
TENSORS = {FORWARD: (2, 2), TRAINING: (6, 6)}
F32, BF16 = torch.float32, torch.bfloat16
SPEEDUPS = {
    ("causal", FORWARD, F32): 1.6, ("causal", TRAINING, F32): 1.6, ("causal", FORWARD, BF16): 2.0,
    ("causal", TRAINING, BF16): 3.0, ("whole", FORWARD, BF16): 1.2, ("whole", TRAINING, BF16): 2.0,
}  # fmt: skip
ROOF_PERCENT = {("causal", F32): 75.0}


def sdpa(q, k, v, **options) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def last_heads(H: int, H_kv: int, tensor: Tensor) -> Tensor:
    """What the oracle computes: heads do not touch each other, and T x T in float64 is large."""
    return tensor[-1:, -max(1, H // H_kv) if tensor.shape[1] == H else -1 :]


def case(kind: str, mode: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Case:
    B, H, H_kv, T, D = shape
    causal = kind == "causal"
    sizes = (B, H, T, D), (B, H_kv, T, D), (B, H_kv, T, D)
    of_q, of_k = TENSORS[mode]
    bounds = {"speedup": SPEEDUPS.get((kind, mode, dtype)), "roof": ROOF_PERCENT.get((kind, dtype))}
    return Case(
        "attention" if causal else f"attention-{kind}", mode, dtype,
        f"B{B}-H{H}{'' if H == H_kv else f'-{H_kv}'}-T{T}-D{D}",
        lambda: [torch.randn(size).to(dtype) for size in sizes], table,
        partial(lspm_kernels.attention, causal=causal), {"torch": partial(sdpa, is_causal=causal)},
        bytes=(of_q * B * H + of_k * B * H_kv) * T * D * dtype.itemsize,
        flops=int(2 * PRODUCTS[mode] * (0.5 if causal else 1.0) * B * H * T * T * D),
        goals=tuple(Goal(what, bound) for what, bound in bounds.items() if bound),
        roof="matmul", part=partial(last_heads, H, H_kv), compiled=False,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for dtype in (F32, BF16):
        for mode in (FORWARD, TRAINING):
            yield from (case("causal", mode, dtype, s) for s in (((2, 2, 1, 40, 64),) if smoke else SHAPES))
            yield case("whole", mode, dtype, (2, 2, 1, 40, 64) if smoke else SHAPES[1])


def gpu_cases() -> Iterator[Case]:
    for mode in (FORWARD, TRAINING):
        yield from (case("causal", mode, BF16, shape) for shape in GPU_SHAPES)
        yield case("whole", mode, BF16, GPU_SHAPES[0])
        yield case("causal", mode, F32, GPU_SHAPES[-1])


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_attention(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("attention", __doc__, cases, gpu_cases=gpu_cases))
