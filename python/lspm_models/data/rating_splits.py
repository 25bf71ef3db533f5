"""Ratings to train on and ratings to test on: random parts, the last of every user, the latest of all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.interactions import Interactions

SPLITS = ("random", "last", "time")


def split(
    interactions: Interactions, kind: str, *, folds: int = 5, fold: int = 0, seed: int = 0
) -> tuple[Interactions, Interactions]:
    """Returns the ratings to train on and those set aside.

    Args:
        interactions: of all ratings.
        kind: random sets one of so many folds aside, last the last rating of every user, and time the latest
            of so many parts.
        folds: parts.
        fold: which of the random parts.
        seed: of the random parts.

    Raises:
        ValueError: kind is unknown, the fold is none, or as of the functions below.
    """
    if kind == "random":
        if not 0 <= fold < folds:
            raise ValueError(f"split: fold must be 0 to {folds - 1}, got {fold}")
        for number, parts in enumerate(k_fold(interactions, folds, seed=seed)):
            if number == fold:
                return parts
    if kind == "last":
        return leave_last_out(interactions)
    if kind == "time":
        return by_time(interactions, 1 / folds)
    raise ValueError(f"split: kind must be one of {', '.join(SPLITS)}, got {kind!r}")


def k_fold(
    interactions: Interactions, folds: int = 5, *, seed: int = 0
) -> Iterator[tuple[Interactions, Interactions]]:
    """Yields (training, test) for each of `folds` random parts as the test part.

    The parts are those of Surprise's KFold(folds, random_state=seed) on ratings in the same order; where the
    ratings do not divide evenly, the first parts have one more.

    Raises:
        ValueError: folds is less than 2 or more than there are ratings.
    """
    if not 2 <= folds <= len(interactions):
        raise ValueError(f"split: folds must be 2 to the number of ratings, {len(interactions)}, got {folds}")
    order = np.arange(len(interactions))
    np.random.RandomState(seed).shuffle(order)
    for part in np.array_split(order, folds):  # which gives the first parts one more
        yield _parts(interactions, torch.from_numpy(part))


def leave_last_out(interactions: Interactions, count: int = 1) -> tuple[Interactions, Interactions]:
    """Sets the last `count` ratings of every user aside, by time; of equal times the later in the data.

    A user with no more ratings than that stays in the training part.

    Raises:
        ValueError: there are no timestamps, count is less than 1, or no user has enough ratings.
    """
    if count < 1:
        raise ValueError(f"split: count must be at least 1, got {count}")
    order = _times(interactions).argsort(stable=True)
    order = order[interactions.users[order].argsort(stable=True)]  # user after user, the latest last
    counts = torch.bincount(interactions.users, minlength=len(interactions.user_ids))
    behind = counts.cumsum(0)[interactions.users[order]] - torch.arange(len(order))  # 1 for a user's last
    chosen = order[(behind <= count) & (counts[interactions.users[order]] > count)]
    if not len(chosen):
        raise ValueError(f"split: a user must have more than {count} ratings, got none with as many")
    return _parts(interactions, chosen)


def by_time(interactions: Interactions, share: float = 0.2) -> tuple[Interactions, Interactions]:
    """Sets the latest share of all ratings aside; of equal times the later in the data.

    Raises:
        ValueError: there are no timestamps, or the share leaves a part empty.
    """
    count = round(share * len(interactions))
    if not 0 < count < len(interactions):
        raise ValueError(f"split: share must leave ratings on both sides of {len(interactions)}, got {share}")
    return _parts(interactions, _times(interactions).argsort(stable=True)[-count:])


def _times(interactions: Interactions) -> Tensor:
    if interactions.timestamps is None:
        raise ValueError("split: ratings must have timestamps to be split by time, got none")
    return interactions.timestamps


def _parts(interactions: Interactions, test: Tensor) -> tuple[Interactions, Interactions]:
    """Returns all but the places in `test`, in their order, and those in `test` in theirs."""
    kept = torch.ones(len(interactions), dtype=torch.bool)
    kept[test] = False
    return interactions.subset(kept), interactions.subset(test)
