"""Passes of stochastic gradient descent over ratings: in PyTorch, by LIBMF's program, and by Surprise."""

import importlib.util
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

import harness
import lspm_kernels
from lspm_kernels import RatingBlocks

SHAPES = {"ml-1m": (6040, 3706, 1_000_000), "ml-20m": (138_493, 26_744, 20_000_000)}  # MovieLens' sizes
SKEW = 1.5  # gives the most popular item of 3,706 some 0.4 % of all ratings, as in MovieLens-1M
MOST_OF_SURPRISE = 2_000_000  # ratings, which it holds as Python's tuples
FEW, MORE = 2, 20  # passes of LIBMF: reading the file and setting up cost as much in either
MORE_OF_SURPRISE = 2


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


def check(
    kernels: list[str], tables: list[Tensor], blocks: RatingBlocks, groups: list, **step: float
) -> None:
    """Holds a pass of each kernel to the same updates in PyTorch."""
    results = {d: [t.to(d, copy=True) for t in tables] for d in (torch.float64, torch.float32)}
    for copies in results.values():
        torch_pass(*copies, groups, **step)
    for name in kernels:
        ours = [t.clone() for t in tables]
        lspm_kernels.mf_sgd_(*ours, blocks, **step, backend=name)
        harness.compare(f"lspm-{name}", ours, results[torch.float64], results[torch.float32])


def warm(turn: Callable[[int], float]) -> Callable[[int], float]:
    """Passes after one of the same side, as in training: the others fill the caches with their tables."""

    def seconds(calls: int) -> float:
        turn(1)
        return turn(calls)

    return seconds


def others(run: Pass, blocks: RatingBlocks) -> dict[str, Callable[[int], float]]:
    """What is installed: functions of a number of calls that give the seconds of as many passes."""
    makers = {"libmf": libmf} if shutil.which("mf-train") else {}
    if importlib.util.find_spec("surprise") and run.ratings <= MOST_OF_SURPRISE:
        makers["surprise"] = surprise
    return {name: make(blocks, run.factors, run.threads) for name, make in makers.items()}


def surprise(blocks: RatingBlocks, factors: int, threads: int) -> Callable[[int], float]:
    """Surprise's SVD, of the same model with biases; on one thread, as it has no other."""
    from surprise import SVD, Trainset

    by_user, by_item = {}, {}
    columns = (t.tolist() for t in (blocks.users, blocks.items, blocks.ratings))
    for user, item, rating in zip(*columns, strict=True):
        by_user.setdefault(user, []).append((item, rating))
        by_item.setdefault(item, []).append((user, rating))
    ids = {n: n for n in range(max(blocks.num_users, blocks.num_items))}
    ratings = Trainset(by_user, by_item, blocks.num_users, blocks.num_items, len(blocks), (1, 5), ids, ids)

    def seconds(passes: int) -> float:
        start = time.perf_counter()
        SVD(factors, passes, lr_all=0.005, reg_all=0.02).fit(ratings)
        return time.perf_counter() - start

    return lambda calls: (seconds(1 + MORE_OF_SURPRISE) - seconds(1)) / MORE_OF_SURPRISE * calls


def libmf(blocks: RatingBlocks, factors: int, threads: int) -> Callable[[int], float]:
    """LIBMF, which has no biases and a rate for each row."""
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
