"""What is known of users and items beside their ratings, out of files with a row for each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lspm_models.data.delimited import TYPED, is_number, plain, read_rows
from lspm_models.data.interactions import Categories, Features, Ids, Interactions

TITLES = ("title", "movietitle", "name", "itemname")
NUMBERS = {"age", "release_year"}  # RecBole calls those of MovieLens tokens


def with_features(interactions: Interactions, side: str, file: str | Path) -> Interactions:
    """Adds what a file knows of users or items; whom only the file knows gets an id too.

    Args:
        interactions: of the ratings.
        side: user or item.
        file: text with the ids in its first column and names or RecBole's types on top.

    Raises:
        ValueError: the file has no names on top, no rows, or a broken line.
    """
    header, rows = read_rows(Path(file))
    kinds = [TYPED.fullmatch(cell) for cell in header]
    names = [cell if kind is None else kind[1] for cell, kind in zip(header, kinds, strict=True)]
    ids = Ids(getattr(interactions, f"{side}_ids").names)
    if header[0] in ids or is_number(header[0]):
        rule = "names of its columns on top, such as id, title"
        raise ValueError(f"features: {file} must have {rule}, got {header[0]!r} for a name")
    table: dict[int, list[str]] = {}
    for line, cells in rows:
        try:
            if len(cells) != len(header):
                raise ValueError(f"columns must be {len(header)}, got {len(cells)}")
            table[ids.add(cells[0].strip())] = cells
        except ValueError as error:
            raise ValueError(f"features: {file}, line {line}: {error}") from None
    if not table:
        raise ValueError(f"features: {file} must hold a row, got none")
    features, titles = Features(), None
    for place, (name, kind) in enumerate(zip(names[1:], kinds[1:], strict=True), 1):
        cells = [table[row][place].strip() if row in table else "" for row in range(len(ids))]
        if side == "item" and plain(name) in TITLES:
            titles = tuple(cell or str(name) for cell, name in zip(cells, ids.names, strict=True))
        elif (kind[2] == "float" or name in NUMBERS) if kind else all(map(is_number, filter(None, cells))):
            numbers = [float(cell) if is_number(cell) else math.nan for cell in cells]
            features.numbers[name] = torch.tensor(numbers, dtype=torch.float32)
        elif kind is None or kind[2] != "float_seq":
            several = _separator(kind, cells)
            split = [[part for part in cell.split(several) if part] for cell in cells]
            features.categories[name] = Categories.of(split)
    changed = {f"{side}_ids": ids, f"{side}_features": features.informative(len(table))}
    if side == "item":
        changed["titles"] = titles
    return replace(interactions, **changed)


def _separator(kind: re.Match | None, cells: Sequence[str]) -> str:
    """Returns what stands between the values in a cell: of Action|Comedy a bar, of RecBole a space."""
    if kind is None:
        return "|" if any("|" in cell for cell in cells) else "\n"
    return " " if kind[2] == "token_seq" else "\n"
