"""Passes of stochastic gradient descent over ratings: in PyTorch, and by LIBMF's program."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lspm_kernels
from lspm_kernels import RatingBlocks

SHAPES = {"ml-1m": (6040, 3706, 1_000_000), "ml-20m": (138_493, 26_744, 20_000_000)}  # MovieLens' sizes
SKEW = 1.5  # gives the most popular item of 3,706 some 0.4 % of all ratings, as in MovieLens-1M
FEW, MORE = 2, 20  # passes of LIBMF: reading the file and setting up cost as much in either


@dataclass(frozen=True)
class Pass:
    """One pass over generated ratings, whose users and items are about as unequal as MovieLens'."""

    name: str
    users: int
    items: int
    ratings: int
    factors: int
    threads: int
    dtype: torch.dtype = torch.float32
    op: str = "mf_sgd"
    roof = "copy"

    @property
    def rows(self) -> int:
        """Of factors that a rating changes: bpr's pair comes with an item that was not chosen."""
        return 3 if self.op == "bpr" else 2

    @property
    def bytes(self) -> int:
        """Each rating's ids and value read once, each table read and written once: more, where a block's rows
        are more than the caches hold."""
        factors = (self.users + self.items) * self.factors * self.dtype.itemsize
        return 12 * self.ratings + 2 * factors

    @property
    def flops(self) -> int:
        """A product of rows, and of every factor changed the step and its shrinking."""
        return self.ratings * self.factors * (2 + 4 * self.rows)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}/pass/{dtype}/{self.name}-K{self.factors}-threads{self.threads}"

    def tables(self) -> list[Tensor]:
        factors = [0.1 * torch.randn(n, self.factors) for n in (self.users, self.items)]
        return [*(f.to(self.dtype) for f in factors), torch.zeros(self.users), torch.zeros(self.items)]


def drawn(users: int, items: int, count: int, grid: int | None = None) -> RatingBlocks:
    """Ratings from 1 to 5 of users and items at random, a few of which have many."""
    ids = [
        torch.randperm(n)[(n * torch.rand(count, dtype=torch.float64) ** SKEW).long()] for n in (users, items)
    ]
    ratings = 1 + 4 * torch.rand(count)
    return lspm_kernels.rating_blocks(*ids, ratings, num_users=users, num_items=items, grid=grid)


def waves(*ids: Tensor) -> tuple[Tensor, list[int]]:
    """An order of pairs or triples of rows and the sizes of its groups, in each of which no row comes twice:
    done group by group, updates give what they give one by one. Columns whose ids may be the same row share
    a table: give them ids apart."""
    last = [0] * (1 + int(torch.stack(ids).max()))
    wave = np.empty(ids[0].numel(), dtype=np.int32)
    for n, rows in enumerate(zip(*(t.tolist() for t in ids), strict=True)):
        group = 1 + max(last[row] for row in rows)
        for row in rows:
            last[row] = group
        wave[n] = group
    return torch.from_numpy(np.argsort(wave, kind="stable")), np.bincount(wave)[1:].tolist()


def groups_of(blocks: RatingBlocks) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Users, items and ratings in groups that share no row."""
    order, sizes = waves(blocks.users, blocks.items + blocks.num_users)
    columns = (t[order].split(sizes) for t in (blocks.users, blocks.items, blocks.ratings))
    return list(zip(*columns, strict=True))


def torch_pass(
    user_factors: Tensor, item_factors: Tensor, user_bias: Tensor, item_bias: Tensor, groups: list, *,
    mean: float, lr: float, reg: float,
) -> None:  # fmt: skip
    """The updates of mf_sgd_, one group after the other."""
    for users, items, ratings in groups:
        p, q, b, c = user_factors[users], item_factors[items], user_bias[users], item_bias[items]
        e = ratings.to(b.dtype) - (mean + b + c + (p * q).sum(1))
        user_factors[users] = p + lr * (e[:, None] * q - reg * p).to(p.dtype)
        item_factors[items] = q + lr * (e[:, None] * p - reg * q).to(q.dtype)
        user_bias[users] = b + lr * (e - reg * b)
        item_bias[items] = c + lr * (e - reg * c)


def has_libmf() -> bool:
    return shutil.which("mf-train") is not None


def libmf(blocks: RatingBlocks, factors: int, threads: int) -> Callable[[int], float]:
    """A function of a number of calls that gives the seconds of as many passes of LIBMF."""
    folder = tempfile.TemporaryDirectory()
    ratings = Path(folder.name) / "ratings.txt"
    columns = (blocks.users, blocks.items, blocks.ratings)
    np.savetxt(ratings, np.stack([t.numpy() for t in columns], 1), fmt=["%d", "%d", "%.4f"])

    def seconds(passes: int) -> float:
        options = f"-k {factors} -t {passes} -s {threads} -l2 0.02 -r 0.05 --quiet".split()
        start = time.perf_counter()
        subprocess.run(
            ["mf-train", *options, ratings, f"{folder.name}/model"], check=True, capture_output=True
        )
        return time.perf_counter() - start

    return lambda calls: (seconds(FEW + MORE) - seconds(FEW)) / MORE * calls
