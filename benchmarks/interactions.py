"""Made ratings of items by users, as skewed as real ones, for the benchmarks of matrix factorisation."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import lspm_kernels

LIKE_ML1M = (6040, 3706, 1_000_000)  # users, items and ratings of MovieLens-1M, rounded


@dataclass(frozen=True, eq=False)
class Ratings:
    """A sparse matrix in compressed rows, and as scipy has it."""

    indptr: Tensor
    indices: Tensor
    values: Tensor
    columns: int

    def __str__(self) -> str:
        return f"{len(self.indptr) - 1}x{self.columns}-nnz{len(self.indices)}"

    @functools.cache  # noqa: B019, as few are drawn, and all are kept
    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """indptr and indices on a device."""
        return self.indptr.to(device), self.indices.to(device)

    def scipy(self, values: Tensor):
        from scipy.sparse import csr_matrix

        arrays = values.numpy(), self.indices.numpy(), self.indptr.numpy()
        return csr_matrix(arrays, (len(self.indptr) - 1, self.columns))


@functools.cache
def zipf(users: int, items: int, count: int) -> tuple[Ratings, Ratings]:
    """About `count` distinct pairs with ratings from 1 to 5, by users and by items.

    The n-th of the users and items is met in proportion to (n + 20) ** -0.7 and (n + 20) ** -0.9: the busiest
    user and the most popular item have about as many ratings as MovieLens-1M's.
    """
    generator = torch.Generator().manual_seed(0)
    names = []
    for size, slope in ((users, 0.7), (items, 0.9)):
        weights = (torch.arange(size, dtype=torch.float64) + 20) ** -slope
        order = torch.randperm(size, generator=generator)
        names.append(order[torch.multinomial(weights, 2 * count, replacement=True, generator=generator)])
    pairs = torch.unique(names[0] * items + names[1])
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:count]].sort().values
    values = torch.randint(1, 6, (len(pairs),), generator=generator).float()
    user, item = pairs // items, pairs % items
    order = torch.argsort(item, stable=True)
    return _ratings(user, item, values, users, items), _ratings(
        item[order], user[order], values[order], items, users
    )


def settled(k: int, by_users: Ratings, by_items: Ratings, **options) -> list[Tensor]:
    """Factors of users and items after a sweep of ALS, where a model's stand at every later one.

    Random positive ones are nearly alike: what conjugate gradient makes of the little that parts them is
    mostly rounding, in PyTorch as in a kernel.
    """
    x = torch.zeros(by_items.columns, k)
    y = torch.rand(by_users.columns, k) / k
    for factors, others, ratings in ((x, y, by_users), (y, x, by_items)):
        values = ratings.values.to(others.device)
        lspm_kernels.mf_als_(factors, others, *ratings.on(others.device), values, **options)
    return [x, y]


def _ratings(row: Tensor, column: Tensor, values: Tensor, rows: int, columns: int) -> Ratings:
    indptr = torch.zeros(rows + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return Ratings(indptr, column.int(), values, columns)
