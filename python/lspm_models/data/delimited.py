"""Tables of text: lines of cells, whatever stands between them."""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

TYPED = re.compile(r"(.+):(token|token_seq|float|float_seq)")  # RecBole's names of columns
QUOTED = re.compile(r'^"([^"]*)"$')
SEPARATORS = ("\t", "::", ";", ",", "|")


def plain(name: str) -> str:
    """Returns a name as it is compared: small letters and digits."""
    return re.sub(r"[\W_]", "", name.lower())


def is_number(text: str) -> bool:
    """Tells whether a cell is a finite number; 1_000 is one in Python alone."""
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def begins_with(path: Path, mark: bytes) -> bool:
    """Tells whether a file begins with these bytes; of what can be read once, as a pipe, nobody asks."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def read_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Returns the cells of the first line, and the others with their numbers.

    Raises:
        ValueError: as the lines are read, that the file is a broken gzip file.
    """
    lines = _lines(path)
    first = next(lines, (1, ""))[1]
    separator = next((mark for mark in SEPARATORS if mark in first), None)

    def cells(line: str) -> list[str]:
        if separator in (None, "::"):
            return line.split(separator)
        if separator == "\t":  # a quote within a cell is part of it, as in RecBole's titles
            return [QUOTED.sub(r"\1", cell) for cell in line.split(separator)]
        try:
            return next(csv.reader([line], delimiter=separator))
        except csv.Error:  # a cell of more than 128 KiB
            return [line]

    header = [cell.strip() for cell in cells(first)]
    return header, ((number, cells(line)) for number, line in lines)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields lines that are not blank with their numbers; not UTF-8 is Latin-1, as of MovieLens-1M."""
    packed = path.suffix == ".gz" or begins_with(path, b"\x1f\x8b")
    opened = gzip.open(path) if packed else path.open("rb")
    with opened as file:
        try:
            number = 0
            for ended in file:
                for raw in ended.rstrip(b"\r\n").split(b"\r"):  # which alone ends lines of old Macs
                    number += 1
                    try:
                        line = raw.decode("utf-8-sig")
                    except UnicodeDecodeError:
                        line = raw.decode("latin-1")
                    if line.strip():
                        yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"ratings: {path} must be a whole gzip file, got {error}") from error
