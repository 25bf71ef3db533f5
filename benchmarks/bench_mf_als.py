"""Half a sweep of implicit ALS over users, against PyTorch's batched solver and the implicit package.

The package runs as many threads as torch; it needs OPENBLAS_NUM_THREADS=1, as it says itself.
"""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from functools import partial

import command
import interactions
import pytest
import torch
from torch import Tensor

import lspm_kernels
from harness import FORWARD, Case, Goal
from lspm_kernels.ops import mf_als as table
from lspm_kernels.reference import mf_als as reference

REG, ALPHA = 0.05, 1.0
STEP = {"reg": REG, "implicit": True, "alpha": ALPHA}


def case(k: int, steps: int, ratings: interactions.Ratings, by_items: interactions.Ratings) -> Case:
    rows, entries = len(ratings.indptr) - 1, len(ratings.indices)
    options = STEP | ({"solver": "cg", "cg_steps": steps} if steps else {})

    def ours(x: Tensor, y: Tensor, values: Tensor, backend: str) -> Tensor:
        return lspm_kernels.mf_als_(x.clone(), y, *ratings.on(x.device), values, backend=backend, **options)

    def one_by_one(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        csr = ratings.on(x.device)
        return reference.mf_als(x, y, csr[0][: len(x) + 1], csr[1], v, None, REG, 0.0, ALPHA, True, steps)

    def in_torch(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        gram = y.T @ y + REG * torch.eye(k, device=y.device)
        indices, matrices, sides = ratings.on(x.device)[1], x.new_empty(len(x), k, k), torch.empty_like(x)
        for row, (begin, end) in enumerate(itertools.pairwise(ratings.indptr.tolist())):
            named, w = y[indices[begin:end]], ALPHA * values[begin:end]
            torch.addmm(gram, named.T * w, named, out=matrices[row])
            torch.mv(named.T, 1 + w, out=sides[row])
        return torch.cholesky_solve(sides[:, :, None], torch.linalg.cholesky(matrices))[:, :, 0]

    def by_implicit(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        from implicit.cpu import _als

        out, confidence = x.clone(), ratings.scipy(1 + ALPHA * values)
        solve = partial(_als.least_squares_cg, cg_steps=steps) if steps else _als.least_squares
        solve(confidence, out.numpy(), y.numpy(), REG, num_threads=torch.get_num_threads())
        return out

    baselines, goals = {"torch": in_torch}, ()  # which has no conjugate gradient, so there too it solves
    if importlib.util.find_spec("implicit") and not torch.cuda.is_available():
        baselines["implicit"], goals = by_implicit, (Goal("implicit", 1.5),)
    return Case(
        "mf_als", FORWARD, torch.float32, f"{'cg' if steps else 'cholesky'}-K{k}-{ratings}",
        lambda: [*interactions.settled(k, ratings, by_items, **STEP), ratings.values], table,
        ours, baselines, roof="matmul", bytes=4 * k * (2 * rows + ratings.columns) + 8 * entries,
        flops=(2 * rows * k + 4 * entries) * k * (steps + 1) if steps else (rows * k // 3 + entries) * k**2,
        goals=goals, compiled=False, meaning=one_by_one,
        part=lambda t: t[:40] if t.shape == (rows, k) else t,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    ratings = interactions.zipf(*((30, 20, 200) if smoke else interactions.LIKE_ML1M))
    for k, steps in itertools.product((8,) if smoke else (64, 128), (3, 0)):
        yield case(k, steps, *ratings)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases(smoke=True)))
def test_mf_als(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("mf_als", __doc__, cases))
