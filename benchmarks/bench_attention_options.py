"""Attention in a window, with dropout and decoding, against PyTorch's scaled_dot_product_attention."""

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import command
import pytest
import torch
from bench_attention import BF16, F32, PRODUCTS, TENSORS, last_heads, sdpa
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case, Goal
from lspm_kernels.ops import attention as table
from lspm_kernels.reference import attention as reference

WINDOW, DROPOUT = 256, 0.1
DENSE, LONG, CACHE = (8, 12, 256, 64), (1, 12, 4096, 64), (4, 12, 4096, 64)  # B, H, T, D


def in_window(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril().triu(-WINDOW)


def case(
    kind: str, mode: str, dtype: torch.dtype, shape: tuple[int, ...], ours: dict, torchs: dict,
    share: float = 0.5, queries: int | None = None, **more,
) -> Case:  # fmt: skip
    B, H, T, D = shape
    T_q = queries or T
    of_q, of_k = TENSORS[mode]
    given = {"roof": "matmul", "part": partial(last_heads, H, H), "compiled": False} | more
    return Case(
        f"attention-{kind}", mode, dtype, "B{}-H{}-T{}-D{}".format(*shape),
        lambda: [torch.randn(B, H, rows, D).to(dtype) for rows in (T_q, T, T)], table,
        partial(lspm_kernels.attention, **ours), {"torch": partial(sdpa, **torchs)},
        bytes=(of_q * T_q + of_k * T) * B * H * D * dtype.itemsize,
        flops=int(2 * PRODUCTS[mode] * share * B * H * T_q * T * D), **given,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for dtype, mode in itertools.product((F32, BF16), (FORWARD, TRAINING)):
        shape = (1, 2, 300, 64) if smoke else LONG
        ours, torchs = {"causal": True, "window": (WINDOW, 0)}, {"attn_mask": in_window(shape[2])}
        share = WINDOW / shape[2]
        yield case("window", mode, dtype, shape, ours, torchs, share, goals=(Goal("speedup", 8.0),))
        # torch draws from another generator, so the reference says what is right; of all heads, as a head's
        # number is among what the draw depends on.
        ours = {"causal": True, "dropout_p": DROPOUT, "seed": 1}
        yield case(
            "dropout", mode, dtype, (2, 2, 40, 64) if smoke else DENSE, ours,
            {"is_causal": True, "dropout_p": DROPOUT}, goals=(Goal("speedup", 4.0),),
            meaning=partial(reference.attention, **ours), part=lambda tensor: tensor,
        )  # fmt: skip
        if mode == FORWARD:
            shape = (2, 2, 300, 64) if smoke else CACHE
            yield case("decode", mode, dtype, shape, {}, {}, 1.0, 1, roof="read", goals=(Goal("roof", 80.0),))


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_attention_options(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("attention_options", __doc__, cases))
