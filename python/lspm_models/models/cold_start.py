"""Rows of users and items without a rating: by what is known of them, or else as others are on average."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lspm_models.data.interactions import Features, Interactions
from lspm_models.models.factor_methods import DAMPING, Tables

UNBIASED = ("nmf", "implicit-als")  # whose average is in the factors
MOST_NAMES = 64  # a feature with more values has few rows for each, and takes memory
RIDGE = 10.0  # rows of the average that stand beside those of a feature


def described(features: Features, rows: int) -> Tensor:
    """Returns numbers (R, F) float64 for what is known of rows: 0 on average, and where it is not known."""
    columns = [torch.zeros(rows, 0, dtype=torch.float64)]
    for found in features.categories.values():
        if len(found.names) <= MOST_NAMES:
            counts = found.offsets.diff()
            row = torch.repeat_interleave(torch.arange(rows), counts)
            shares = torch.zeros(rows, len(found.names), dtype=torch.float64)
            shares.index_put_((row, found.values), 1 / counts[row].double(), accumulate=True)
            columns.append(shares.where(counts[:, None] > 0, torch.nan))
    columns += [numbers[:, None].double() for numbers in features.numbers.values()]
    table = torch.cat(columns, 1)
    table = table - table.nanmean(0)
    spread = table.square().nanmean(0).sqrt()
    numbers = table.shape[1] - len(features.numbers)
    table[:, numbers:] /= spread[numbers:].where(spread[numbers:] > 0, 1.0)
    return table.nan_to_num(0.0)


def filled(tables: Tables, interactions: Interactions, method: str) -> Tables:
    """Returns tables in which rows without a rating have what rows like them have, and a stranger's behind.

    That is the least squares of the other rows, factors and bias, on described() features, each with weight
    n / (n + DAMPING) for n ratings. A stranger, of whom nothing is known, and rows without features have the
    average row; with a method that has biases zeros, which leaves the mean and the other side's bias.
    """
    changed = {}
    for side in ("user", "item"):
        names = f"{side}_factors", f"{side}_bias"
        factors, bias = (getattr(tables, name) for name in names)
        rows = torch.cat((factors, bias[:, None]), 1)
        counts = torch.bincount(getattr(interactions, f"{side}s"), minlength=len(rows)).double()
        counts *= (rows != 0).any(1)  # as of who was folded in with none but strangers
        found = _averages(rows, counts, getattr(interactions, f"{side}_features"), method)
        rows = torch.cat((rows.where(counts[:, None] > 0, found[:-1]), found[-1:]))
        changed |= zip(names, (rows[:, :-1].contiguous(), rows[:, -1].contiguous()), strict=True)
    return replace(tables, **changed)


def _averages(rows: Tensor, counts: Tensor, features: Features, method: str) -> Tensor:
    """Returns what is expected of rows (R, K + 1) with so many ratings, and of a stranger, (R + 1, K + 1)."""
    x = described(features, len(rows))
    weights = (counts / (counts + DAMPING))[:, None]
    if not weights.any():
        return rows.new_zeros(len(rows) + 1, rows.shape[1])
    mean = (weights * rows).sum(0) / weights.sum()
    moved = x - (weights * x).sum(0) / weights.sum()
    matrix = moved.T @ (weights * moved) + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    slopes = torch.linalg.solve(matrix, moved.T @ (weights * (rows - mean)))
    stranger = mean if method in UNBIASED else torch.zeros_like(mean)
    expected = mean + moved @ slopes if x.shape[1] else stranger.expand(len(rows), -1)
    found = torch.cat((expected, stranger[None])).float()
    return found.clamp(min=0) if method == "nmf" else found
