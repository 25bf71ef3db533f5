"""Matrix factorisation as people use it: fit, predict, recommend, explain, and fold in whoever is new."""

from __future__ import annotations

import json
import numbers
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lspm_kernels
from lspm_models.checkpoint import read_state, read_tensors
from lspm_models.data.interaction_store import load_interactions, save_interactions
from lspm_models.data.interactions import Interactions, offsets_of
from lspm_models.data.interactions_of import interactions_of
from lspm_models.files import remove, replaced, write_tensors
from lspm_models.models import cold_start, fold_in
from lspm_models.models.factor_methods import IMPLICIT, METHODS, Rows, Tables
from lspm_models.models.factorization_config import MatrixFactorizationConfig


class Recommendation(NamedTuple):
    """An item: the user's own id of it, its title, and its score."""

    item: object
    title: str
    score: float


class MatrixFactorization:
    """R = user_factors item_factors' + user_bias + item_bias + mean, by one of six methods.

    Args:
        config: how to factorise.
    """

    def __init__(self, config: MatrixFactorizationConfig | None = None) -> None:
        self.config = MatrixFactorizationConfig.of() if config is None else config
        self.interactions: Interactions | None = None
        self.tables: Tables | None = None
        self.epochs_done = 0
        self._cold: tuple[tuple, Tables] | None = None

    @property
    def implicit(self) -> bool:
        """Whether scores are no ratings."""
        return self.config.method in IMPLICIT

    def fit(
        self, interactions: Any, callback: Callable[[int, float, float], object] | None = None
    ) -> MatrixFactorization:
        """Trains; goes on where a model that was saved between two epochs had come to, with the same bits.

        Args:
            interactions: the ratings: Interactions, or what interactions_of() takes, as a sparse matrix,
                columns (users, items, ratings[, weights]) or a data frame. Pairs that come twice are kept;
                implicit-als adds them up, as those of a log are, and svd takes their mean. Weights are those
                of errors; implicit-als multiplies ratings by them, so that counts may be either; svd has them
                in mean and biases alone, nmf and bpr take each rating as one.
            callback: is called after each epoch with its number from 1, its loss and the seconds so far;
                training stops where it gives False.

        Raises:
            ValueError: the ratings are none, or nmf or implicit-als is given a negative one.
            FloatingPointError: the loss is not finite, as where the learning rate is too high; the model is
                then as if it had not been fitted.
        """
        interactions = interactions_of(interactions)
        if self.config.method in ("nmf", "implicit-als") and interactions.ratings.min() < 0:
            low = interactions.ratings.min().item()
            raise ValueError(f"mf: ratings must be at least 0 for {self.config.method}, got {low:g}")
        if self.interactions is not None and interactions.fingerprint() != self.interactions.fingerprint():
            self.tables, self.epochs_done = None, 0
        if self.epochs_done >= self.config.epochs:
            self.tables, self.epochs_done = None, 0
        self.interactions = interactions
        method = METHODS[self.config.method](interactions, self.config)
        if self.tables is None:
            generator = torch.Generator().manual_seed(self.config.seed)
            sizes, k = (len(interactions.user_ids), len(interactions.item_ids)), self.config.factors
            drawn = (torch.randn(n, k, generator=generator, dtype=torch.float32) for n in sizes)
            biases = (torch.zeros(n, dtype=torch.float32) for n in sizes)
            self.tables = Tables(*(self.config.std * t for t in drawn), *biases)
            method.begin(self.tables, generator)
        began = time.monotonic()
        for epoch in range(self.epochs_done, self.config.epochs):
            loss = method.epoch(self.tables, epoch)
            if not abs(loss) < float("inf"):
                self.tables, self.epochs_done = None, 0
                raise FloatingPointError(f"mf: {method.loss} of epoch {epoch + 1} must be finite, got {loss}")
            self.epochs_done = epoch + 1
            if callback is not None and callback(epoch + 1, loss, time.monotonic() - began) is False:
                break
        return self

    def predict(self, users: Tensor, items: Tensor) -> Tensor:
        """Ratings of pairs of internal ids, (N,) int64 each, -1 for one that is not known.

        Whoever has no rating is as those with like features are; of whom nothing is known, only the mean and
        the other side's bias count, or to nmf and implicit-als the average row. Ratings stay within the
        scale; of an implicit method these are scores.

        Raises:
            ValueError: an id is neither internal nor -1.
        """
        t = self._with_cold()
        # -1 is the last row, a stranger's.
        u, i = (_rows(*side) for side in (("users", users, t.user_bias), ("items", items, t.item_bias)))
        biases = {"user_bias": t.user_bias, "item_bias": t.item_bias, "mean": t.mean}
        found = lspm_kernels.mf(t.user_factors, t.item_factors, u, i, **biases)
        return found if self.implicit else found.clamp(*self.interactions.scale)

    def scores(self, users: Tensor) -> Tensor:
        """Scores of the whole catalogue, (B, I), for internal ids (B,)."""
        factors, of_items, bias = self.products(users)
        t = self._with_cold()
        return factors @ of_items.T + bias + t.user_bias[users][:, None] + t.mean

    def products(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors (B, K) of users and (I, K) of all items, and what an item's scores have beside products."""
        t = self._with_cold()
        return t.user_factors[users], t.item_factors[:-1], t.item_bias[:-1]

    def recommend(
        self, users: Sequence, n: int = 10, *, filter_seen: bool = True
    ) -> list[list[Recommendation]]:
        """The n best items for each user, by their own id; one without a rating is as predict() has it.

        Raises:
            ValueError: n is less than 1, or users are no sequence or one text.
        """
        t, data = self._with_cold(), self.interactions
        _check_count("recommend", n)
        if isinstance(users, str) or not isinstance(users, Iterable):
            raise ValueError(f"recommend: users must be a sequence of ids, got {users!r}")
        rows = torch.tensor([data.user_ids.place(user, -1) for user in users], dtype=torch.int64)
        known, row = (rows >= 0), rows.clamp(min=0)
        factors, of_items, item_bias = self.products(rows)
        bases = t.mean + t.user_bias[rows]
        indptr = indices = None
        if filter_seen:
            asked = torch.zeros(len(data.user_ids), dtype=torch.bool)
            asked[rows[known]] = True
            theirs = asked[data.users]  # one pass, as to sort all ratings takes seconds where they are many
            mine = data.users[theirs], data.items[theirs], data.ratings[theirs]
            seen = Rows.of(*mine, None, len(data.user_ids))
            parts = [seen.indices[seen.indptr[r] : seen.indptr[r + 1]] for r in row]
            parts = [part[: len(part) * int(k)] for part, k in zip(parts, known, strict=True)]
            indptr = offsets_of(torch.tensor([len(part) for part in parts], dtype=torch.int64))
            indices = torch.cat([*parts, seen.indices[:0]]).long()
        scores, items = lspm_kernels.top_k_scores(
            factors, of_items, min(n, len(data.item_ids)), item_bias=item_bias,
            exclude_indptr=indptr, exclude_indices=indices,
        )  # fmt: skip
        return [self._named(i, s + base) for i, s, base in zip(items, scores, bases, strict=True)]

    def similar_items(self, item: object, n: int = 10) -> list[Recommendation]:
        """The n items whose factors point most nearly the way of an item's, with their cosines.

        Raises:
            ValueError: the item is not known, or n is less than 1.
        """
        _check_count("similar_items", n)
        data = self._fitted().interactions
        row = data.item_ids.internal([item], "item")
        unit = torch.nn.functional.normalize(self._with_cold().item_factors[:-1], dim=1)
        scores, items = lspm_kernels.top_k_scores(
            unit[row], unit, min(n, len(unit)), exclude_indptr=torch.tensor([0, 1]), exclude_indices=row
        )
        return self._named(items[0], scores[0])

    def explain(self, user: object, item: object, n: int = 10) -> list[Recommendation]:
        """The n of a user's ratings that speak most for an item, with what each adds to its score.

        Raises:
            ValueError: the user or the item is not known, or n is less than 1.
        """
        _check_count("explain", n)
        data = self._fitted().interactions
        row = data.user_ids.internal([user], "user")[0]
        column = int(data.item_ids.internal([item], "item")[0])
        chosen = data.users == row
        zeros = torch.zeros(int(chosen.sum()), dtype=torch.int64)
        weights = None if data.weights is None else data.weights[chosen]
        mine = Rows.of(zeros, data.items[chosen], data.ratings[chosen], weights, 1)
        items, parts = fold_in.contributions(self.tables, mine, column, self.config)
        best = parts.argsort(descending=True, stable=True)[:n]
        return self._named(items[best], parts[best])

    def partial_fit(self, interactions: Any) -> MatrixFactorization:
        """Takes in users and items that come new with these ratings; those known already stay as they are.

        Who has no rating of somebody known is placed by features, where the model has such as well.
        """
        self._fitted()
        new = interactions_of(interactions)
        found = fold_in.folded_in(self.tables, self.interactions, new, self.config)
        self.tables, self.interactions = found
        return self

    def save(self, folder: Path | str) -> None:
        """Writes a folder of safetensors and JSON, from which load() and fit() go on."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_interactions(self._fitted().interactions, folder)
        self.write(folder / "factors")

    @classmethod
    def load(cls, folder: Path | str) -> MatrixFactorization:
        """Reads what save() wrote.

        Raises:
            ValueError: it is not there, or damaged.
        """
        return cls.read(Path(folder) / "factors", load_interactions(Path(folder)))

    def write(self, folder: Path) -> None:
        """Writes everything but the ratings into a folder, whole or not at all."""
        tables = self._fitted().tables
        state = {"step": self.epochs_done, "mean": tables.mean, "settings": {"model": asdict(self.config)}}
        with replaced(folder) as partial:
            partial.mkdir()
            tensors = {name: tensor.contiguous() for name, tensor in tables.tensors().items()}
            write_tensors(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            (partial / "state.json").write_text(json.dumps(state, indent=1))
            if folder.exists():
                remove(folder)

    @classmethod
    def read(cls, folder: Path, interactions: Interactions) -> MatrixFactorization:
        """Reads what write() wrote of a model of these ratings.

        Raises:
            ValueError: it is not there, damaged, or of other ratings.
        """
        state, tensors = read_state(folder), read_tensors(folder / "model.safetensors")
        try:
            model = cls(MatrixFactorizationConfig(**state["settings"]["model"]))
            model.tables, model.epochs_done = Tables(**tensors, mean=state["mean"]), state["step"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"mf: {folder} must hold a factorisation, got {error!r:.120}") from error
        rows = len(model.tables.user_bias), len(model.tables.item_bias)
        if rows != (len(interactions.user_ids), len(interactions.item_ids)):
            raise ValueError(f"mf: {folder} must have a row for every user and item, got {rows}")
        model.interactions = interactions
        return model

    def _with_cold(self) -> Tables:
        """The tables with rows for who has no rating, and strangers' behind them."""
        key = self._fitted().tables, self.interactions, self.epochs_done
        if self._cold is None or any(a is not b for a, b in zip(key, self._cold[0], strict=True)):
            self._cold = key, cold_start.filled(self.tables, self.interactions, self.config.method)
        return self._cold[1]

    def _fitted(self) -> MatrixFactorization:
        if self.tables is None:
            raise ValueError("mf: the model must be fitted before it is used, got one that is not")
        return self

    def _named(self, items: Tensor, scores: Tensor) -> list[Recommendation]:
        data = self.interactions
        found = [(i, s) for i, s in zip(items.tolist(), scores.tolist(), strict=True) if i >= 0]
        return [Recommendation(data.item_ids.names[i], data.title(i), s) for i, s in found]


def _rows(what: str, ids: Tensor, table: Tensor) -> Tensor:
    ids, most = torch.as_tensor(ids), len(table) - 2
    if ids.numel() and not -1 <= ids.min() <= ids.max() <= most:
        got = ids[(ids < -1) | (ids > most)][0].item()
        raise ValueError(f"predict: {what} must be internal ids, -1 to {most}, got {got}")
    return ids % len(table)


def _check_count(what: str, n: int) -> None:
    if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{what}: n must be a whole number of at least 1, got {n}")
