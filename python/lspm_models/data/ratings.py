"""Ratings for training: which, how they are split, and batches of them, shuffled anew in every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.interaction_store import load_interactions, save_interactions
from lspm_models.data.interactions import Interactions
from lspm_models.data.rating_files import KNOWN, NAMED, read_interactions
from lspm_models.data.rating_splits import SPLITS, split
from lspm_models.options import option
from lspm_models.progress import counted


@dataclass(frozen=True)
class RatingConfig:
    """Which ratings, and how they are split."""

    data: str = option(
        "ml-100k",
        f"{', '.join(NAMED)}; a CSV, TSV, RecBole or parquet file; or a folder with RecBole's files",
        metavar="DATA",
    )
    columns: tuple[str, ...] = option(
        (), f"such as user=buyer rating=stars, of {', '.join(KNOWN)}", default="by their names or places"
    )
    users: str | None = option(None, "file with what is known of users", default="none", metavar="FILE")
    items: str | None = option(None, "file with titles and the like", default="none", metavar="FILE")
    skip_bad_lines: bool = option(False, "leave out lines that cannot be understood")
    split: str = option(
        "random", "what is set aside: a random part, each user's last, the latest part", choices=SPLITS
    )
    folds: int = option(5, "parts, one of which is set aside")
    fold: int = option(0, "which of the random parts, from 0")
    split_seed: int = option(0, "of the random parts")
    positive: float = option(4.0, "the least rating that counts as liked")

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"data: split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.folds < 2:
            raise ValueError(f"data: folds must be at least 2, got {self.folds}")
        if not 0 <= self.fold < self.folds:
            raise ValueError(f"data: fold must be 0 to {self.folds - 1}, got {self.fold}")
        if not 0 <= self.split_seed < 2**32:
            rule = "0 or greater and below 2 ** 32"
            raise ValueError(f"data: split_seed must be {rule}, got {self.split_seed}")
        if not abs(self.positive) < float("inf"):
            raise ValueError(f"data: positive must be a finite number, got {self.positive}")
        self.roles()

    def roles(self) -> dict[str, str]:
        """Returns the columns by what they are."""
        for pair in self.columns:
            if pair.partition("=")[0] not in KNOWN or not pair.partition("=")[2]:
                raise ValueError(
                    f"data: columns must be such as user=NAME, of {', '.join(KNOWN)}, got {pair!r}"
                )
        return dict(pair.split("=", 1) for pair in self.columns)

    def parts(self, interactions: Interactions) -> tuple[Interactions, Interactions]:
        """Returns the ratings to train on and those set aside."""
        return split(interactions, self.split, folds=self.folds, fold=self.fold, seed=self.split_seed)


def prepare_ratings(
    config: RatingConfig, folder: Path, report: Callable[[str], None]
) -> tuple[Interactions, Interactions]:
    """Reads ratings into a run folder, or takes them out of it, and splits them.

    Args:
        config: which ratings.
        folder: the run folder; gets ratings.safetensors and catalogue.json, all that recommending needs.
        report: takes lines for the reader.

    Returns:
        The ratings to train on and those set aside.

    Raises:
        ValueError: they cannot be read or split.
    """
    if (folder / "catalogue.json").exists():
        found = load_interactions(folder)
    else:
        found = read_interactions(
            config.data,
            columns=config.roles(),
            users=config.users,
            items=config.items,
            skip_bad_lines=config.skip_bad_lines,
        )
    training, held_out = config.parts(found)
    if not (folder / "catalogue.json").exists():
        save_interactions(found, folder)
    users, items = counted(len(found.user_ids), "user"), counted(len(found.item_ids), "item")
    left_out = f", {counted(found.skipped, 'bad line')} left out" if found.skipped else ""
    report(
        f"ratings    {Path(config.data).name}: {len(training):,} to train on, {len(held_out):,} set aside, "
        f"{users}, {items}{left_out}"
    )
    return training, held_out


class RatingBatches:
    """Batches of ratings; the whole state is how many were drawn.

    The ratings stand in one endless row, a new permutation in every epoch, and every process takes its share
    of each piece of that row.

    Args:
        pairs: (N, 2) int64.
        targets: (N, 2) float32.
        batch_size: ratings per batch and process.
        seed: of the permutations.
        process: which share this process takes, of `processes`.
    """

    def __init__(
        self,
        pairs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._pairs, self._targets, self._batch_size, self._seed = pairs, targets, batch_size, seed
        self._process, self._processes = process, processes
        self._drawn, self._epoch, self._order = 0, -1, torch.empty(0, dtype=torch.int64)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns pairs (B, 2) of user and item, int64, and targets (B, 2) of rating and weight, float32."""
        first = self._drawn + self._process * self._batch_size
        self._drawn += self._processes * self._batch_size
        places, last = [], first + self._batch_size
        while first < last:
            epoch, within = divmod(first, len(self._pairs))
            piece = self._permutation(epoch)[within : within + last - first]
            places.append(piece)
            first += len(piece)
        chosen = torch.cat(places)
        return self._pairs[chosen], self._targets[chosen]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._pairs))
            self._epoch, self._order = epoch, torch.from_numpy(order)
        return self._order

    def state(self) -> dict:
        """Returns how many ratings were drawn."""
        return {"drawn": self._drawn}

    def restore(self, state: dict) -> None:
        """Continues exactly where state() was taken."""
        self._drawn = state["drawn"]


class RatingData:
    """The batches that fit() asks for.

    Args:
        training: ratings.
        held_out: ratings set aside.
        batch_size: ratings per batch and process.
        validation_batches: batches at most per evaluation, the first of those set aside.
        seed: of the permutations.
        process: which share this process trains on, of `processes`.
    """

    def __init__(
        self,
        training: Interactions,
        held_out: Interactions,
        batch_size: int,
        *,
        validation_batches: int = 16,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        recipe = (training.fingerprint() + held_out.fingerprint()).encode()
        self.fingerprint = hashlib.blake2b(recipe, digest_size=16).hexdigest()
        self.known, self.held_out = training, held_out
        share = {"seed": seed, "process": process, "processes": processes}
        self.training = RatingBatches(*_tensors(training), batch_size, **share)
        self._batch_size, self._batches = batch_size, validation_batches

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same ratings set aside every time."""
        pairs, targets = _tensors(self.held_out)
        for first in range(0, min(len(pairs), self._batches * self._batch_size), self._batch_size):
            chosen = slice(first, first + self._batch_size)
            yield pairs[chosen], targets[chosen]


def _tensors(interactions: Interactions) -> tuple[Tensor, Tensor]:
    ratings, weights = interactions.ratings, interactions.weights
    targets = torch.stack((ratings, torch.ones_like(ratings) if weights is None else weights), 1)
    return torch.stack((interactions.users, interactions.items), 1), targets
