"""Ratings as they lie on a disk: CSV and the like, RecBole's files with typed headers, parquet, pandas."""

from __future__ import annotations

import importlib.util
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lspm_models.data.delimited import TYPED, begins_with, is_number, plain, read_rows
from lspm_models.data.interactions import MOST, Ids, Interactions
from lspm_models.data.rating_features import with_features

# What the columns are called where nobody says so, compared in small letters without _, - and spaces.
KNOWN = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid"),
    "item": ("itemid", "item", "iid", "movieid", "movie", "productid", "asin", "bookid", "artistid"),
    "rating": ("rating", "ratings", "score", "stars", "overall", "label", "click"),
    "weight": ("weight", "weights", "count"),
    "timestamp": ("timestamp", "time", "unixreviewtime", "date"),
}
ORDER = ("user", "item", "rating", "timestamp")  # of columns without names, as MovieLens has them
RECBOLE = "with: pip install --no-deps recbole"


def read_interactions(
    source: str | Path,
    *,
    columns: dict[str, str] | None = None,
    users: str | Path | None = None,
    items: str | Path | None = None,
    skip_bad_lines: bool = False,
) -> Interactions:
    """Reads ratings, with what is known of users and items.

    Args:
        source: ml-100k, which the package recbole brings; a file; or a folder with RecBole's NAME.inter and
            perhaps NAME.user and NAME.item. A file is parquet, or else text, gzip or not, with tabs, commas,
            semicolons, bars, :: or spaces between its columns and perhaps their names on top; without names
            they are user, item, rating, timestamp. A file without ratings has ones.
        columns: which columns are user, item, rating, weight and timestamp, where their names do not tell.
        users: a file with what is known of users, by their ids in its first column.
        items: the same of items; a column called title or name says what people call them.
        skip_bad_lines: leave out lines that cannot be understood, and count them.

    Raises:
        ValueError: source is no such thing, holds fewer than two ratings, or a line is broken; the message
            says which.
    """
    path, sides = _found(source)
    columns = dict(columns or {})
    if path.suffix == ".parquet" or begins_with(path, b"PAR1"):
        found = from_frame(_parquet(path), columns, name=str(path))
    else:
        found = _read_text(path, columns, skip_bad_lines)
    if len(found) < 2:
        raise ValueError(f"ratings: {path} must hold at least two ratings, got {len(found) or 'none'}")
    for side, given in (("user", users), ("item", items)):
        file = sides.get(side) if given is None else Path(given)
        if file is not None:
            if not file.exists() or file.is_dir():
                got = "a folder" if file.is_dir() else "no such path"
                raise ValueError(f"ratings: {side}s must be a file, got {got}: {file}")
            found = with_features(found, side, file)
    return found


def from_frame(frame: Any, columns: dict[str, str] | None = None, *, name: str = "frame") -> Interactions:
    """Takes ratings out of a data frame of pandas or polars, a pyarrow table, or a dict of arrays.

    Args:
        frame: columns by name; what is neither user, item, rating, weight nor timestamp is left.
        columns: which columns those are, where their names do not tell.
        name: what messages call it.

    Raises:
        ValueError: a column is missing, or as of Interactions.from_arrays.
    """
    # pyarrow's, those of pandas and polars, or of a dict.
    names = next((getattr(frame, at) for at in ("column_names", "columns") if hasattr(frame, at)), frame)
    labels = list(names)
    places = _columns(name, [str(label) for label in labels], columns or {})
    taken = {role: _column(frame[labels[place]]) for role, place in places.items()}
    if "timestamp" in taken and taken["timestamp"].dtype.kind in "OU":  # dates as text
        moments = ((t, seconds_of(t) if isinstance(t, str) else None) for t in taken["timestamp"])
        taken["timestamp"] = [t if moment is None else moment for t, moment in moments]
    try:
        arguments = (taken.get(role) for role in ("user", "item", "rating", "weight", "timestamp"))
        return Interactions.from_arrays(*arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"ratings: {name}: {error}") from error


def _column(values: Any) -> np.ndarray:
    """Returns a column as an array, times as seconds, NaN where there is none."""
    zoned = getattr(getattr(values, "dtype", None), "tz", None) is not None
    found = np.asarray(values, "datetime64[ns]" if zoned else None)
    if found.dtype.kind != "M":
        return found
    found = found.astype("datetime64[ns]")
    return np.where(np.isnat(found), np.nan, found.astype(np.int64) / 1e9)


def _found(source: str | Path) -> tuple[Path, dict[str, Path]]:
    """Returns the file of the ratings, and those of the sides."""
    path = Path(source)
    if str(source) in NAMED:
        path = NAMED[str(source)]()
    if not path.exists():
        names = ", ".join(NAMED)
        raise ValueError(f"ratings: {str(source)!r} must be a file, a folder or {names}, got no such path")
    if path.is_dir():
        files = sorted(path.glob("*.inter"))
        if len(files) != 1:
            raise ValueError(f"ratings: {path} must hold one file NAME.inter, got {len(files) or 'none'}")
        path = files[0]
    sides = {side: path.with_suffix(f".{side}") for side in ("user", "item") if path.suffix == ".inter"}
    return path, {side: file for side, file in sides.items() if file.exists()}


def _movielens() -> Path:
    package = importlib.util.find_spec("recbole")
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"ratings: ml-100k needs the package recbole, got none; install it {RECBOLE}")
    return Path(package.submodule_search_locations[0], "dataset_example", "ml-100k")


NAMED: dict[str, Callable[[], Path]] = {"ml-100k": _movielens}


def _columns(name: str, header: Sequence[str], given: dict[str, str]) -> dict[str, int]:
    """Returns the places of the columns that are there."""
    if unknown := sorted(set(given) - set(KNOWN)):
        raise ValueError(f"ratings: columns must be of {', '.join(KNOWN)}, got {unknown[0]!r}")
    plain_names, places = [plain(cell) for cell in header], {}
    for role, candidates in KNOWN.items():
        if role in given:
            if given[role] not in header:
                raise ValueError(f"ratings: {name} must have a column {given[role]!r}, got {_shown(header)}")
            places[role] = header.index(given[role])
        else:
            found = [plain_names.index(candidate) for candidate in candidates if candidate in plain_names]
            if found and found[0] not in places.values():
                places[role] = found[0]
    for role in ("user", "item"):
        if role not in places:
            raise ValueError(
                f"ratings: {name} must have a column for the {role}, got {_shown(header)}; say which it is"
            )
    for place in places.values():
        if header.count(header[place]) > 1:
            raise ValueError(f"ratings: {name} must have one column {header[place]!r}, got several")
    for role, other in itertools.combinations(given, 2):
        if given[role] == given[other]:
            rule = f"have columns of their own for {role} and {other}"
            raise ValueError(f"ratings: {name} must {rule}, got {given[role]!r} for both")
    return places


def _shown(header: Sequence[str]) -> str:
    """Returns the names of columns for a message, of a file that is no text as well."""
    return "".join(c if c.isprintable() else "?" for c in ", ".join(header)[:200])


def _read_text(path: Path, columns: dict[str, str], skip_bad_lines: bool) -> Interactions:
    header, rows = read_rows(path)
    typed = any(TYPED.fullmatch(cell) for cell in header)
    names = [cell.split(":")[0] if typed else cell for cell in header]
    if typed or columns or any(plain(name) in KNOWN["user"] for name in names):
        places = _columns(str(path), names, columns)
    elif len(header) < 2 or any(map(str.isalpha, map(plain, header[2:]))):
        raise ValueError(
            f"ratings: {path} must have a column for the user, got {_shown(header).strip() or 'nothing'}"
            + ("; say which it is" if len(header) > 1 else "")
        )
    else:
        places = dict(zip(ORDER, range(len(header)), strict=False))
        rows = _with_first(header, rows)
    read = _Reader(path, places, len(header))
    for line, cells in rows:
        try:
            read.add(cells)
        except ValueError as error:
            if not skip_bad_lines:
                raise ValueError(f"ratings: {path}, line {line}: {error}") from None
            read.skipped += 1
    return read.interactions()


def _with_first(header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield 1, header
    yield from rows


class _Reader:
    """Takes in lines of ratings: columns of numbers, so that text is not kept."""

    def __init__(self, path: Path, places: dict[str, int], width: int) -> None:
        self.path, self.places, self.width, self.skipped = path, places, width, 0
        self.ids = Ids(), Ids()
        self.users, self.items = array("q"), array("q")
        self.numbers = {role: array("d") for role in places if role not in ("user", "item")}

    def add(self, cells: list[str]) -> None:
        if len(cells) != self.width:
            raise ValueError(f"columns must be {self.width}, got {len(cells)}")
        numbers = {role: self._number(role, cells[self.places[role]]) for role in self.numbers}
        names = [cells[self.places[role]].strip() for role in ("user", "item")]
        for name in names:  # both, before one of them gets a place
            Ids.check(name)
        user, item = (known.add(name) for known, name in zip(self.ids, names, strict=True))
        self.users.append(user)
        self.items.append(item)
        for role, value in numbers.items():
            self.numbers[role].append(value)

    def _number(self, role: str, text: str) -> float:
        if role == "timestamp" and (moment := seconds_of(text)) is not None:
            return moment
        if not is_number(text):
            raise ValueError(f"{role} must be a finite number, got {text.strip()!r}")
        if role != "timestamp" and abs(float(text)) > MOST:
            raise ValueError(f"{role} must be a number that float32 holds, got {text.strip()}")
        if role == "weight" and float(text) < 0:
            raise ValueError(f"weight must be 0 or greater, got {text.strip()}")
        return float(text)

    def interactions(self) -> Interactions:
        if not len(self.users):
            left = f" of {self.skipped} lines" if self.skipped else ""
            raise ValueError(f"ratings: {self.path} must hold at least two ratings, got none{left}")
        columns = {role: torch.from_numpy(np.array(column)) for role, column in self.numbers.items()}
        ratings = columns.get("rating", torch.ones(len(self.users))).float()
        places = (torch.from_numpy(np.array(column)) for column in (self.users, self.items))
        weights = columns["weight"].float() if "weight" in columns else None
        times = columns.get("timestamp")
        return Interactions(*places, ratings, *self.ids, weights, times, skipped=self.skipped)


def seconds_of(text: str) -> float | None:
    """Returns the time of a date such as 2020-01-31 or 2020-01-31 09:30, UTC unless it says; None of others.

    20200131 is no date here but a number.
    """
    if "-" not in text[1:]:
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ValueError(f"ratings: {path} needs the package pyarrow; pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"ratings: {path} must be a parquet file, got {error}") from error
    return {name: table[name].to_numpy() for name in table.column_names}
