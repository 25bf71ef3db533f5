"""Rows for users and items that a factorisation was not trained on, and what a score is made of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import lspm_kernels
from lspm_models.data.interactions import Categories, Features, Ids, Interactions
from lspm_models.models.factor_methods import IMPLICIT, Rows, Tables

NMF_UPDATES = 50


def solved(rows: Rows, other: Tensor, other_bias: Tensor, mean: float, config) -> tuple[Tensor, Tensor]:
    """Factors (R, K) and biases (R,) of rows, the other side's (C, K) and (C,) given.

    Of ratings: least squares on [other, 1], whose last number is the bias, regularised as the method is; of
    nmf: multiplicative updates; of choices: one half sweep of implicit least squares.
    """
    count = len(rows.indptr) - 1
    if config.method in IMPLICIT:
        rows = chosen(rows, config)
    shape = rows.indptr, rows.indices
    if config.method == "nmf":
        factors = other.new_full((count, other.shape[1]), other.mean().item())
        for _ in range(NMF_UPDATES):
            lspm_kernels.nmf_(factors, other, *shape, rows.values, reg=config.reg)
        return factors, other.new_zeros(count)
    if config.method in IMPLICIT:
        factors = other.new_zeros(count, other.shape[1])
        reg = config.reg if config.method == "implicit-als" else max(1.0, config.reg)
        options = {"reg": reg, "alpha": config.alpha, "weighted_reg": config.weighted_reg, "implicit": True}
        lspm_kernels.mf_als_(factors, other, *shape, rows.values, **options)
        return factors, other.new_zeros(count)
    # A step of sgd shrinks factors once for every rating.
    weighted = 1.0 if config.method == "sgd" else config.weighted_reg
    values = rows.values - mean - other_bias[rows.indices.long()]
    found = other.new_zeros(count, other.shape[1] + 1)
    extended = torch.cat((other, other.new_ones(len(other), 1)), 1)
    # Without regularisation fewer ratings than numbers leave many solutions; steps find the shortest.
    solver = {} if config.reg else {"solver": "cg", "cg_steps": extended.shape[1]}
    lspm_kernels.mf_als_(
        found, extended, *shape, values, weight=rows.weights, reg=config.reg, weighted_reg=weighted, **solver
    )
    return found[:, :-1].contiguous(), found[:, -1].contiguous()


def chosen(rows: Rows, config) -> Rows:
    """Returns how much each item was chosen, as the method was trained with it, once for each item."""
    weighted = config.method == "implicit-als" and rows.weights is not None
    return replace(rows, values=rows.values * rows.weights if weighted else rows.values).added_up()


def folded_in(tables: Tables, old: Interactions, new: Interactions, config) -> tuple[Tables, Interactions]:
    """Tables with rows for the users, and then the items, that come new; what was there stays as it is.

    Returns: the tables, and all ratings, old and new.
    """
    data = joined(old, new)
    u, i = tables.user_factors, tables.item_factors
    tables = replace(tables)
    sides = (
        ("user", data.users, data.items, len(u), len(data.user_ids), len(i)),
        ("item", data.items, data.users, len(i), len(data.item_ids), len(data.user_ids)),
    )
    for side, mine, theirs, known, total, known_there in sides:
        other = "item" if side == "user" else "user"
        chosen = (mine >= known) & (theirs < known_there)
        weights = None if data.weights is None else data.weights[chosen]
        rows = Rows.of(mine[chosen] - known, theirs[chosen], data.ratings[chosen], weights, total - known)
        there = getattr(tables, f"{other}_factors"), getattr(tables, f"{other}_bias")
        found = solved(rows, *there, tables.mean, config)
        for name, part in zip(("factors", "bias"), found, strict=True):
            before = getattr(tables, f"{side}_{name}")
            setattr(tables, f"{side}_{name}", torch.cat((before, part)))
    return tables, data


def joined(old: Interactions, new: Interactions) -> Interactions:
    """Both, by the ids of old and behind them those that new has besides, with features that old knows."""
    ids, internal, features = [], [], {}
    for side in ("user", "item"):
        known = Ids(getattr(old, f"{side}_ids").names)
        places = torch.tensor([known.add(name) for name in getattr(new, f"{side}_ids").names])
        ids.append(known)
        internal.append(torch.cat((getattr(old, f"{side}s"), places[getattr(new, f"{side}s")])))
        count, which = len(getattr(old, f"{side}_ids")), f"{side}_features"
        comers = places.argsort()[places.sort().values >= count]  # where new has them, in their order
        features[which] = _longer(getattr(old, which), getattr(new, which), comers, count)
    columns = {"ratings": torch.cat((old.ratings, new.ratings))}
    if old.weights is not None or new.weights is not None:
        weights = (torch.ones_like(d.ratings) if d.weights is None else d.weights for d in (old, new))
        columns["weights"] = torch.cat(tuple(weights))
    times = old.timestamps, new.timestamps
    columns["timestamps"] = None if None in (times[0], times[1]) else torch.cat(times)
    titles = old.titles
    if titles is not None:
        added = ids[1].names[len(old.item_ids) :]
        titles = (*titles, *(_title(new, name) for name in added))
    return replace(
        old, users=internal[0], items=internal[1], user_ids=ids[0], item_ids=ids[1], titles=titles, **columns,
        **features,
    )  # fmt: skip


def contributions(tables: Tables, mine: Rows, item: int, config) -> tuple[Tensor, Tensor]:
    """What each rating of one user adds to the score of an item, were the user folded in with these alone.

    Folding in solves (sum of y y' + l I) x = sum of v y, so that <q, x> is a sum over the ratings.

    Returns: (n,) items and (n,) numbers.
    """
    if config.method in IMPLICIT:
        mine = chosen(mine, config)
    items = mine.indices.long()
    y, q = tables.item_factors[items].double(), tables.item_factors[item].double()
    reg = config.reg * (len(items) if config.method == "sgd" else len(items) ** config.weighted_reg)
    if config.method in IMPLICIT:
        confidence = config.alpha * mine.values.double()
        everything = tables.item_factors.double()
        matrix = everything.T @ everything + y.T @ (confidence[:, None] * y)
        values = 1 + confidence
    else:
        counts = torch.ones(len(items)) if mine.weights is None or config.method == "nmf" else mine.weights
        matrix = y.T @ (counts.double()[:, None] * y)
        values = counts * (mine.values.double() - tables.mean - tables.item_bias[items].double())
    matrix += max(reg, 1e-6) * torch.eye(len(q), dtype=torch.float64)
    return items, (values * (y @ torch.linalg.solve(matrix, q))).float()


def _title(data: Interactions, name: object) -> str:
    return data.title(int(data.item_ids.internal([name])[0]))


def _longer(old: Features, new: Features, comers: Tensor, count: int) -> Features:
    """The features of `count` rows, and behind them what new knows of its rows `comers` (M,)."""
    if not len(comers):
        return old
    categories = {}
    for name, known in old.categories.items():
        if (there := new.categories.get(name)) is None:
            offsets = torch.cat((known.offsets, known.offsets[-1:].expand(len(comers))))
            categories[name] = Categories(known.names, known.values, offsets)
        else:
            labels = [known.labels(row) for row in range(count)]
            categories[name] = Categories.of(labels + [there.labels(row) for row in comers.tolist()])
    nothing = torch.full((int(comers.max()) + 1,), torch.nan, dtype=torch.float32)
    return Features(
        categories,
        {name: torch.cat((t, new.numbers.get(name, nothing)[comers])) for name, t in old.numbers.items()},
    )
