"""One multiplicative update of a non-negative factor over observed entries, against PyTorch."""

import sys
from collections.abc import Iterator

import command
import interactions
import pytest
import torch
from torch import Tensor

import lspm_kernels
from harness import FORWARD, Case, Goal
from lspm_kernels.ops import nmf as table
from lspm_kernels.reference import nmf as reference

REG, EPS = 0.06, 1e-12


def case(k: int, ratings: interactions.Ratings) -> Case:
    rows, entries = len(ratings.indptr) - 1, len(ratings.indices)

    def ours(x: Tensor, y: Tensor, values: Tensor, backend: str) -> Tensor:
        return lspm_kernels.nmf_(
            x.clone(), y, *ratings.on(x.device), values, reg=REG, eps=EPS, backend=backend
        )

    def in_torch(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        return reference.nmf(x, y, *ratings.on(x.device), values, REG, EPS)

    return Case(
        "nmf", FORWARD, torch.float32, f"K{k}-{ratings}",
        lambda: [torch.rand(rows, k), torch.rand(ratings.columns, k), ratings.values], table,
        ours, {"torch": in_torch}, bytes=4 * k * (2 * rows + ratings.columns) + 8 * entries,
        flops=6 * k * entries, roof="matmul", goals=(Goal("speedup", 1.5),), compiled=False,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    ratings = interactions.zipf(*((30, 20, 200) if smoke else interactions.LIKE_ML1M))[0]
    for k in (8,) if smoke else (16, 64):
        yield case(k, ratings)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases(smoke=True)))
def test_nmf(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("nmf", __doc__, cases))
