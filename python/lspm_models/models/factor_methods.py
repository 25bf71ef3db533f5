"""The ways to factorise ratings, an epoch at a time: what a method begins with, and what an epoch does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lspm_kernels
from lspm_kernels.rating_blocks import parts_to_draw_from
from lspm_models.data.interactions import Interactions, offsets_of

DAMPING = 10.0  # ratings of the mean that stand beside a user's or item's own in its bias
OVERSAMPLING = 10  # columns of the random projection beyond those that are kept
IMPLICIT = ("bpr", "implicit-als")
UNWEIGHTED = ("bpr", "nmf")


@dataclass
class Tables:
    """What a factorisation learns: R = user_factors item_factors' + user_bias + item_bias + mean.

    Args:
        user_factors: (U, K) float32.
        item_factors: (I, K) float32.
        user_bias: (U,) float32.
        item_bias: (I,) float32.
        mean: of the ratings, or 0.
    """

    user_factors: Tensor
    item_factors: Tensor
    user_bias: Tensor
    item_bias: Tensor
    mean: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Rows:
    """Ratings by rows, as alternating methods read them.

    Args:
        indptr: (R + 1,) int64, where each row's entries begin.
        indices: (N,) int32, their columns, ascending within a row.
        values: (N,) float32.
        weights: (N,) float32, or None.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, weights: Tensor | None, count: int) -> Rows:
        """Sorts entries by row and column; pairs that come twice stay two entries."""
        order = columns.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        indptr = offsets_of(torch.bincount(rows, minlength=count))
        kept = None if weights is None else weights[order].contiguous()
        return cls(indptr, columns[order].int().contiguous(), values[order].contiguous(), kept)

    def added_up(self) -> Rows:
        """Returns one entry for each pair, whose value is the sum of all it has; without weights."""
        count = len(self.indptr) - 1
        rows = torch.repeat_interleave(torch.arange(count), self.indptr.diff())
        first = torch.ones(len(rows), dtype=torch.bool)
        first[1:] = (rows.diff() != 0) | (self.indices.diff() != 0)
        sums = torch.zeros(int(first.sum()), dtype=torch.float64)
        sums.index_add_(0, first.cumsum(0) - 1, self.values.double())
        indptr = offsets_of(torch.bincount(rows[first], minlength=count))
        return Rows(indptr, self.indices[first], sums.float(), None)


def both_ways(interactions: Interactions, values: Tensor) -> tuple[Rows, Rows]:
    """Returns values of the ratings by user, and by item."""
    u, i, w = interactions.users, interactions.items, interactions.weights
    sizes = len(interactions.user_ids), len(interactions.item_ids)
    return Rows.of(u, i, values, w, sizes[0]), Rows.of(i, u, values, w, sizes[1])


def weighted_ratings(interactions: Interactions) -> Tensor:
    """Returns how much users chose: ratings, which are 1 in a file of counts, times weights (N,)."""
    ratings, weights = interactions.ratings, interactions.weights
    return ratings if weights is None else ratings * weights


def mean_and_biases(interactions: Interactions) -> tuple[float, Tensor, Tensor]:
    """Returns the mean, the items' biases from it, and the users' from both, each drawn towards 0."""
    weights = interactions.weights
    weights = torch.ones_like(interactions.ratings) if weights is None else weights
    ratings, users, items = interactions.ratings, interactions.users, interactions.items
    mean = float((weights * ratings).double().sum() / weights.double().sum().clamp(min=1e-12))

    def bias(ids: Tensor, size: int, left: Tensor) -> Tensor:
        zeros = torch.zeros(size, dtype=torch.float64)
        counts = zeros.index_add(0, ids, weights.double())
        return (zeros.index_add(0, ids, (weights * left).double()) / (counts + DAMPING)).float()

    item_bias = bias(items, len(interactions.item_ids), ratings - mean)
    user_bias = bias(users, len(interactions.user_ids), ratings - mean - item_bias[items])
    return mean, user_bias, item_bias


@dataclass
class Method:
    """One factorisation in progress.

    Args:
        begin: fills the tables before the first epoch, which hold small random factors.
        epoch: changes the tables, and returns the loss of an epoch, by its number from 0.
        loss: what the loss is called.
    """

    begin: Callable[[Tables, torch.Generator], None]
    epoch: Callable[[Tables, int], float]
    loss: str = "loss"


def sgd(interactions: Interactions, config) -> Method:
    """Biased factorisation by stochastic gradient descent, at a rate that falls from epoch to epoch."""
    blocks = lspm_kernels.rating_blocks(
        interactions.users, interactions.items, interactions.ratings, interactions.weights,
        num_users=len(interactions.user_ids), num_items=len(interactions.item_ids),
    )  # fmt: skip

    weights = interactions.ratings.new_ones(1) if interactions.weights is None else interactions.weights
    total = weights.double().expand(len(interactions)).sum().clamp(min=1e-12)

    def begin(tables: Tables, generator: torch.Generator) -> None:
        tables.mean = ((weights * interactions.ratings).double().sum() / total).item()

    def epoch(tables: Tables, number: int) -> float:
        loss = lspm_kernels.mf_sgd_(
            *tables.tensors().values(), blocks, mean=tables.mean, lr=config.lr * config.lr_decay**number,
            reg=config.reg, nonnegative=config.nonnegative,
        )  # fmt: skip
        return (loss.item() / total.item()) ** 0.5

    return Method(begin, epoch, "RMSE while training")


def bpr(interactions: Interactions, config) -> Method:
    """Bayesian personalised ranking; the parts that items are compared in are dealt anew at every epoch."""
    ones = torch.ones_like(interactions.ratings)
    sizes = {"num_users": len(interactions.user_ids), "num_items": len(interactions.item_ids)}
    seen = Rows.of(interactions.users, interactions.items, ones, None, sizes["num_users"])
    grid = parts_to_draw_from(sizes["num_items"])

    def epoch(tables: Tables, number: int) -> float:
        seed = config.seed + number
        blocks = lspm_kernels.rating_blocks(
            interactions.users, interactions.items, ones, **sizes, grid=grid, seed=seed
        )
        loss, skipped = lspm_kernels.bpr_(
            tables.user_factors, tables.item_factors, tables.item_bias, blocks,
            seen=(seen.indptr, seen.indices), lr=config.lr * config.lr_decay**number, reg=config.reg,
            seed=seed,
        )  # fmt: skip
        return loss.item() / max(1, len(interactions) - int(skipped))

    return Method(lambda tables, generator: None, epoch)


def als(interactions: Interactions, config) -> Method:
    """Alternating least squares on what mean and biases leave of the ratings."""
    mean, user_bias, item_bias = mean_and_biases(interactions)
    left = interactions.ratings - mean - user_bias[interactions.users] - item_bias[interactions.items]

    def begin(tables: Tables, generator: torch.Generator) -> None:
        tables.mean = mean
        tables.user_bias.copy_(user_bias)
        tables.item_bias.copy_(item_bias)

    return Method(begin, _sweeps(*both_ways(interactions, left), config, implicit=False), "objective")


def implicit_als(interactions: Interactions, config) -> Method:
    """Alternating least squares on what users chose, with a confidence that grows with the rating."""
    both = both_ways(interactions, weighted_ratings(interactions))
    rows = [each.added_up() for each in both]  # as two entries, a pair would be wanted twice as much as one
    return Method(lambda tables, generator: None, _sweeps(*rows, config, implicit=True), "objective")


def _sweeps(by_user: Rows, by_item: Rows, config, *, implicit: bool) -> Callable[[Tables, int], float]:
    options = {"reg": config.reg, "implicit": implicit, "alpha": config.alpha}
    options["weighted_reg"] = config.weighted_reg

    def solve(factors: Tensor, other: Tensor, rows: Rows) -> None:
        lspm_kernels.mf_als_(
            factors, other, rows.indptr, rows.indices, rows.values,
            weight=None if implicit else rows.weights, solver=config.solver, **options,
        )  # fmt: skip

    def epoch(tables: Tables, number: int) -> float:
        solve(tables.user_factors, tables.item_factors, by_user)
        solve(tables.item_factors, tables.user_factors, by_item)
        return lspm_kernels.mf_als_loss(
            tables.user_factors, tables.item_factors, by_user.indptr, by_user.indices, by_user.values,
            weight=None if implicit else by_user.weights, **options,
        ).item()  # fmt: skip

    return epoch


def nmf(interactions: Interactions, config) -> Method:
    """Non-negative factors by multiplicative updates, without biases."""
    by_user, by_item = both_ways(interactions, interactions.ratings)

    def begin(tables: Tables, generator: torch.Generator) -> None:
        # Products of such factors are about the mean rating.
        size = (interactions.ratings.double().mean().item() / tables.user_factors.shape[1]) ** 0.5
        for factors in (tables.user_factors, tables.item_factors):
            factors.uniform_(0.5 * size, 1.5 * size, generator=generator)

    def epoch(tables: Tables, number: int) -> float:
        p, q = tables.user_factors, tables.item_factors
        lspm_kernels.nmf_(p, q, by_user.indptr, by_user.indices, by_user.values, reg=config.reg)
        lspm_kernels.nmf_(q, p, by_item.indptr, by_item.indices, by_item.values, reg=config.reg)
        found = (p[interactions.users] * q[interactions.items]).sum(1)
        return (found - interactions.ratings).square().mean().sqrt().item()

    return Method(begin, epoch, "RMSE")


def svd(interactions: Interactions, config) -> Method:
    """Singular vectors of what mean and biases leave, 0 where there is no rating, by random projection.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.
    """
    mean, user_bias, item_bias = mean_and_biases(interactions)
    left = interactions.ratings - mean - user_bias[interactions.users] - item_bias[interactions.items]
    sizes = len(user_bias), len(item_bias)
    places = torch.stack((interactions.users, interactions.items))
    both = torch.stack((left, torch.ones_like(left)), 1)  # of a pair that comes twice the mean
    found = torch.sparse_coo_tensor(places, both, (*sizes, 2), check_invariants=True).coalesce()
    means = found.values()[:, 0] / found.values()[:, 1]
    matrix = torch.sparse_coo_tensor(found.indices(), means, sizes, check_invariants=True, is_coalesced=True)
    turned = matrix.t().coalesce()
    generator = torch.Generator().manual_seed(config.seed)
    width = min(config.factors + OVERSAMPLING, *sizes)
    bases = [torch.randn(sizes[1], width, generator=generator, dtype=torch.float32)]

    def begin(tables: Tables, generator: torch.Generator) -> None:
        tables.mean = mean
        tables.user_bias.copy_(user_bias)
        tables.item_bias.copy_(item_bias)
        tables.user_factors.zero_()
        tables.item_factors.zero_()

    def epoch(tables: Tables, number: int) -> float:
        while len(bases) < number + 2:  # more than one where training goes on from a file
            across = torch.linalg.qr(matrix @ bases[-1]).Q
            u, s, v = torch.linalg.svd((turned @ across).T, full_matrices=False)
            bases.append(v.T)
        count = min(config.factors, len(s))
        root = s[:count].sqrt()
        tables.user_factors[:, :count] = (across @ u)[:, :count] * root
        tables.item_factors[:, :count] = v.T[:, :count] * root
        return s[:count].square().sum().sqrt().item()

    return Method(begin, epoch, "norm")


METHODS: dict[str, Callable[..., Method]] = {
    "sgd": sgd, "als": als, "implicit-als": implicit_als, "nmf": nmf, "bpr": bpr, "svd": svd,
}  # fmt: skip
