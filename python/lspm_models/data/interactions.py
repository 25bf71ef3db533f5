"""Who rated what: ratings by internal ids, the way back to the user's own, and what is known of both sides.

Internal ids count from 0 in the order in which users and items first occur; tables of a model are as long as
`user_ids` and `item_ids`. Duplicated pairs are kept: each is a rating of its own.
"""

from __future__ import annotations

import hashlib
import numbers
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

NEGATIVE = re.compile(r"-\d+")
# A feature that tells nearly every row apart, such as a zip code, is another id and teaches nothing.
MOST_VALUES = 0.5
MOST = torch.finfo(torch.float32).max


class Ids:
    """The user's own ids in the order of the internal ones.

    An id is found by its text: 196 and "196" are one, so a command line finds what an array brought.

    Args:
        names: ints or strings.
    """

    def __init__(self, names: Iterable[Hashable] = ()) -> None:
        self.names: list = []
        self._places: dict[str, int] = {}
        for name in names:
            self.add(name)

    def add(self, name: Any) -> int:
        """Returns the internal id of a name, a new one where it has none.

        Raises:
            ValueError: the name is empty, negative, or no id at all.
        """
        name = _whole(name)
        text = str(name)
        place = self._places.get(text)
        if place is None:
            self.check(name)
            place = self._places[text] = len(self.names)
            self.names.append(name if isinstance(name, str | int) else int(name))  # NumPy's
        return place

    @staticmethod
    def check(name: Any) -> None:
        """Raises ValueError where a name can be no id."""
        if not isinstance(name, str | numbers.Integral) or not str(name):
            raise ValueError(f"id must be a whole number or a text, got {name!r}")
        if NEGATIVE.fullmatch(str(name)):
            raise ValueError(f"id must be 0 or greater, got {name}")

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: Any) -> bool:
        return str(_whole(name)) in self._places

    def place(self, name: Any, default: int) -> int:
        """Returns the internal id of a name, or the default where it is not known."""
        return self._places.get(str(_whole(name)), default)

    def internal(self, names: Sequence, what: str = "ids: id") -> Tensor:
        """Returns the internal ids (N,) int64 of names.

        Raises:
            ValueError: a name is not known.
        """
        try:
            return torch.tensor([self._places[str(_whole(name))] for name in names], dtype=torch.int64)
        except KeyError as error:
            raise ValueError(f"{what} must be one of the {len(self)} known, got {error}") from None


@dataclass(frozen=True)
class Categories:
    """A feature with a set of values for each row, of any size: genres, or one gender.

    Args:
        names: of the values.
        values: (M,) int64, the values of all rows, one row after another.
        offsets: (N + 1,) int64, where each row's begin and the last ends.
    """

    names: tuple[str, ...]
    values: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[str]]) -> Categories:
        """Numbers the values in sorted order."""
        names = tuple(sorted({name for row in rows for name in row}))
        places = {name: place for place, name in enumerate(names)}
        values = torch.tensor([places[name] for row in rows for name in row], dtype=torch.int64)
        return cls(names, values, offsets_of(torch.tensor([len(row) for row in rows], dtype=torch.int64)))

    def labels(self, row: int) -> list[str]:
        """Returns the names of a row's values."""
        first, last = self.offsets[row : row + 2].tolist()
        return [self.names[value] for value in self.values[first:last].tolist()]


@dataclass(frozen=True)
class Features:
    """What is known of all users, or of all items, by internal id.

    Args:
        categories: by name.
        numbers: by name, (N,) float32; NaN where one is not known.
    """

    categories: dict[str, Categories] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def informative(self, rows: int) -> Features:
        """Returns those that do not tell nearly every row apart."""
        kept = {name: item for name, item in self.categories.items() if len(item.names) <= MOST_VALUES * rows}
        return replace(self, categories=kept)


@dataclass(frozen=True)
class Interactions:
    """Ratings of items by users.

    Args:
        users: (N,) int64 internal ids.
        items: (N,) int64 internal ids.
        ratings: (N,) float32.
        user_ids: the user's own.
        item_ids: the user's own.
        weights: (N,) float32 that say how much a rating counts, or None.
        timestamps: (N,) float64, or None.
        user_features: of every user.
        item_features: of every item.
        titles: of every item, or None.
        skipped: lines that the reader left out.
    """

    users: Tensor
    items: Tensor
    ratings: Tensor
    user_ids: Ids
    item_ids: Ids
    weights: Tensor | None = None
    timestamps: Tensor | None = None
    user_features: Features = field(default_factory=Features)
    item_features: Features = field(default_factory=Features)
    titles: tuple[str, ...] | None = None
    skipped: int = 0

    @classmethod
    def from_arrays(
        cls,
        users: Sequence,
        items: Sequence,
        ratings: Sequence | None = None,
        weights: Sequence | None = None,
        timestamps: Sequence | None = None,
    ) -> Interactions:
        """Makes interactions of arrays, lists or tensors.

        Args:
            users: N ids, whole numbers or texts.
            items: N ids.
            ratings: N numbers; None stands for ones, as of clicks.
            weights: N numbers of 0 or more, or None.
            timestamps: N numbers, or None.

        Raises:
            ValueError: there are none, their numbers differ, an id is negative or missing, or a number is not
                finite; the message says where.
        """
        for what, names in (("users", users), ("items", items)):
            if isinstance(names, str) or not hasattr(names, "__len__"):
                raise ValueError(f"interactions: {what} must be a column of ids, got {names!r:.60}")
        if not len(users):
            raise ValueError("interactions: users must hold at least one rating, got none")
        ids, internal = [], []
        for what, names in (("users", users), ("items", items)):
            known = Ids()
            internal.append(torch.tensor(_numbered(known, what, _listed(names)), dtype=torch.int64))
            ids.append(known)
        numbers = {"ratings": np.ones(len(users)) if ratings is None else ratings}
        numbers |= {"weights": weights, "timestamps": timestamps}
        for what, values in {"items": items, **numbers}.items():
            count = getattr(values, "__len__", lambda: "no column")()
            if values is not None and count != len(users):
                raise ValueError(f"interactions: {what} must be as many as users, {len(users)}, got {count}")
        columns = {
            what: None if values is None else _finite(what, values) for what, values in numbers.items()
        }
        return cls(*internal, columns["ratings"], *ids, columns["weights"], columns["timestamps"])

    def __len__(self) -> int:
        return len(self.users)

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and the highest rating."""
        return self.ratings.min().item(), self.ratings.max().item()

    def subset(self, places: Tensor) -> Interactions:
        """Returns some of the ratings, (M,) int64 or (N,) bool, with the ids and features of all."""
        weights = None if self.weights is None else self.weights[places]
        timestamps = None if self.timestamps is None else self.timestamps[places]
        columns = {name: getattr(self, name)[places] for name in ("users", "items", "ratings")}
        return replace(self, **columns, weights=weights, timestamps=timestamps)

    def by_user(self) -> tuple[Tensor, Tensor]:
        """Returns which ratings each user gave.

        Returns:
            Offsets (U + 1,) int64, and (N,) int64 places of ratings: those of user u lie from offsets[u] to
            offsets[u + 1], in the order of the data.
        """
        counts = torch.bincount(self.users, minlength=len(self.user_ids))
        return offsets_of(counts), self.users.argsort(stable=True)

    def popularity(self) -> Tensor:
        """Returns how many ratings each item has, (I,) int64."""
        return torch.bincount(self.items, minlength=len(self.item_ids))

    def title(self, item: int) -> str:
        """Returns what people call an item: its title, or else the user's own id."""
        return str(self.item_ids.names[item]) if self.titles is None else self.titles[item]

    def fingerprint(self) -> str:
        """Returns a hash of the ratings and the features."""
        tensors = [self.users, self.items, self.ratings, self.weights, self.timestamps]
        for side in (self.user_features, self.item_features):
            for name, found in sorted(side.categories.items()):
                tensors += [
                    torch.frombuffer(bytearray(repr((name, found.names)).encode()), dtype=torch.uint8)
                ]
                tensors += [found.values, found.offsets]
            tensors += [tensor for _, tensor in sorted(side.numbers.items())]
        total = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            total.update(b"-" if tensor is None else tensor.numpy().tobytes())
        return total.hexdigest()


def offsets_of(counts: Tensor) -> Tensor:
    """Returns where each of N rows of so many entries begins, and where the last ends, (N + 1,)."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _whole(name: Any) -> Any:
    """Returns an id, whole floats as ints: pandas makes those of whole numbers where one is missing."""
    name = name.item() if getattr(name, "ndim", None) == 0 else name  # one of a tensor's or an array's
    return int(name) if isinstance(name, float) and name.is_integer() else name


def _listed(values: Any) -> Sequence:
    return values.tolist() if hasattr(values, "tolist") else values  # Python's numbers, not NumPy's


def _numbered(known: Ids, what: str, names: Sequence) -> list[int]:
    places = []
    for row, name in enumerate(names):
        try:
            places.append(known.add(name))
        except ValueError as error:
            raise ValueError(f"interactions: {what}[{row}]: {error}") from None
    return places


def _finite(what: str, values: Any) -> Tensor:
    """Returns numbers as a tensor: float32, or float64 of times, which need all digits."""
    if isinstance(values, Tensor):  # bfloat16 too, which NumPy has not
        values = values.detach().to("cpu", torch.promote_types(values.dtype, torch.float64))
    try:
        values = np.asarray(values)
        if values.dtype.kind == "c":
            raise TypeError(values.dtype)
        found = torch.tensor(values.astype(np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"interactions: {what} must be numbers, got others: {error}") from error
    if found.dim() != 1:
        raise ValueError(f"interactions: {what} must be of one dimension, got {tuple(found.shape)}")
    rule = "a finite number of 0 or more" if what == "weights" else "a finite number"
    wrong = ~found.isfinite() | ((found < 0) & (what == "weights"))
    if not wrong.any() and what != "timestamps":
        wrong, rule = found.abs() > MOST, "a number that float32 holds"
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"interactions: {what}[{row}] must be {rule}, got {found[row].item()}")
    return found if what == "timestamps" else found.float()
