"""Files that hold many labelled images: IDX, CIFAR's binaries, CSV.

What cannot be read is left out, named and counted: a damaged image is no reason to end a run. A file of
labels that disagrees with its images is one, for then no label can be trusted.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LABEL_COLUMNS = ("label", "class", "target")
CIFAR_PIXELS = 3 * 32 * 32
MOST_CLASSES = 2**16  # of a table; a larger number is no label but, say, the image's own


@dataclass
class Images:
    """Labelled images, in memory or to be decoded when they are wanted.

    Args:
        labels: (N,) int64.
        names: of the images, for messages.
        pixels: (N, C, H, W) uint8, or None where `paths` are decoded instead.
        paths: of the files.
        skipped: what was left out: its name and why, or how many it stands for.
    """

    labels: np.ndarray
    pixels: np.ndarray | None = None
    paths: Sequence[Path] = ()
    skipped: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, chosen: np.ndarray) -> Images:
        """Returns the images at these places."""
        pixels = None if self.pixels is None else self.pixels[chosen]
        paths = [self.paths[index] for index in chosen] if len(self.paths) else ()
        return Images(self.labels[chosen], pixels, paths, self.skipped)

    def fingerprint(self) -> bytes:
        """Returns a hash of labels and pixels, or of the files' names and sizes."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        if self.pixels is not None:
            digest.update(repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes())
        for path in self.paths:
            digest.update(b"\0%b/%b\0%d" % (*map(os.fsencode, path.parts[-2:]), path.stat().st_size))
        return digest.digest()


def kind_of(path: Path) -> str | None:
    """Returns which reader a file is for, None where none is."""
    name = path.name.removesuffix(".gz")
    if "labels" in name and "idx1" in name:
        return None
    if "idx3" in name or "idx4" in name:
        return "idx"
    return {".csv": "csv", ".bin": "cifar"}.get(Path(name).suffix)


def read_images(path: Path) -> Images:
    """Reads a file of images, and for IDX the file of labels beside it.

    Raises:
        ValueError: the file is none of these, or holds no image's beginning, or labels disagree with images.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(
            f"images: {path} must be named as IDX (…-images-idx3-ubyte), CIFAR (.bin) or CSV (.csv), "
            "gzip or not, got another name"
        )
    return {"idx": _read_idx, "csv": _read_csv, "cifar": _read_cifar}[kind](path)


def read_whole(path: Path) -> tuple[bytes, str]:
    """Returns the bytes of a file, of a damaged gzip file those before the damage, and what the damage is."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content, ""
    parts, file = [], gzip.GzipFile(fileobj=io.BytesIO(content))
    try:
        while part := file.read1(1 << 20):
            parts.append(part)
    except (OSError, EOFError, zlib.error) as error:
        return b"".join(parts), str(error)
    return b"".join(parts), ""


def _read_idx(path: Path) -> Images:
    labels_path = path.with_name(
        path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    )
    if labels_path == path or not labels_path.exists():
        raise ValueError(f"images: {path} must have its labels beside it, got no {labels_path.name}")
    promised, pixels, damage = _idx(path)
    labels_promised, labels, labels_damage = _idx(labels_path)
    if pixels.ndim not in (3, 4) or labels.ndim != 1:
        raise ValueError(f"images: {path} must hold images, got an array of {pixels.ndim} dimensions")
    if pixels.ndim == 4 and len(pixels) and pixels.shape[1] not in (1, 3):
        raise ValueError(f"images: {path} must hold images of 1 or 3 channels, got {pixels.shape[1]}")
    if promised != labels_promised:
        raise ValueError(
            f"images: {labels_path} must have a label for each of the {promised:,} images of {path.name}, "
            f"got {labels_promised:,}"
        )
    count = min(len(pixels), len(labels))
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    skipped = {}
    if count < promised:
        skipped[str(path if len(pixels) < promised else labels_path)] = (
            damage or labels_damage or "shorter than it says",
            promised - count,
        )
    return Images(labels[:count].astype(np.int64), pixels[:count], skipped=skipped)


def _idx(path: Path) -> tuple[int, np.ndarray, str]:
    """Returns how many items an IDX file promises, those it has whole, and what damage it has."""
    content, damage = read_whole(path)
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:3] != b"\0\0\x08" or not dimensions or len(content) < start:
        got = f"{content[:4].hex(' ') or 'nothing'}" + (f" ({damage})" if damage else "")
        raise ValueError(f"images: {path} must be IDX of unsigned bytes (00 00 08 ..), got {got}")
    count, *shape = (int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    size = math.prod(shape)
    whole = min(count, (len(content) - start) // size if size else 0)
    if not whole:  # numbers that a damaged header holds may be more than an array can have
        return count, np.empty((0,) * dimensions, np.uint8), damage
    items = np.frombuffer(content, np.uint8, whole * size, start).reshape(whole, *shape)
    return count, items, damage


def _read_cifar(path: Path) -> Images:
    content, damage = read_whole(path)
    # CIFAR-100 has a coarse label before the fine one, and calls its files train and test.
    labels = 2 if path.name.startswith(("train.", "test.")) else 1
    if len(content) % (labels + CIFAR_PIXELS) and len(content) % (3 - labels + CIFAR_PIXELS) == 0:
        labels = 3 - labels
    size = labels + CIFAR_PIXELS
    rows = np.frombuffer(content, np.uint8, len(content) // size * size).reshape(-1, size)
    skipped = {}
    if rest := len(content) % size:
        skipped[str(path)] = (damage or f"{rest} bytes at its end are no image of {size}", 1)
    pixels = rows[:, labels:].reshape(-1, 3, 32, 32)
    return Images(rows[:, labels - 1].astype(np.int64), pixels, skipped=skipped)


def _read_csv(path: Path) -> Images:
    """Reads rows of pixels 0 to 255 and a label, which is last unless a header calls another column so."""
    content, damage = read_whole(path)
    text = content.decode("utf-8-sig", errors="replace")
    skipped = {f"{path} (its end)": (damage, 1)} if damage else {}
    if damage:
        text = text[: text.rfind("\n") + 1]
    rows = ((number, row) for number, row in enumerate(csv.reader(io.StringIO(text)), 1) if row)
    line, first = next(rows, (1, []))
    header = line if any(not _is_number(cell) for cell in first) else 0  # the line that it is
    names = [cell.strip().lower() for cell in first] if header else []
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), len(first) - 1)
    shape = _square(len(first) - 1)
    if shape is None:
        raise ValueError(
            f"images: rows of {path} must have the pixels of a square, once or three times, and a label, "
            f"got {len(first)} columns"
        )
    try:
        if text.count("\n", 0, -1) < header:
            raise ValueError  # loadtxt would warn of a table without rows
        table = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=header, ndmin=2)
        if table.shape[1] != len(first) or not np.array_equal(table, np.abs(np.floor(table))):
            raise ValueError
        if np.delete(table, label, axis=1).max() > 255 or table[:, label].max() >= MOST_CLASSES:
            raise ValueError
    except ValueError:  # some row is damaged: look at each
        table = np.array(list(_csv_rows(path, text, header, len(first), label, skipped)), np.float64)
        table = table.reshape(-1, len(first))
    # MNIST is often copied with its labels first and no header, and its last pixel is always black.
    told = set(names) & set(LABEL_COLUMNS)
    if not told and not table[:, label].any() and len(np.unique(table[:, 0])) > 1:
        raise ValueError(
            f"images: {path} must have its labels last, or below a header with {' or '.join(LABEL_COLUMNS)}, "
            "got 0 last in every row"
        )
    pixels = np.delete(table, label, axis=1).astype(np.uint8).reshape(-1, *shape)
    return Images(table[:, label].astype(np.int64), pixels, skipped=skipped)


def _csv_rows(
    path: Path, text: str, header: int, columns: int, label: int, skipped: dict
) -> Iterator[list[int]]:
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if not row or number == header:
            continue
        try:
            values = [_whole(cell) for cell in row]
            if len(values) != columns:
                raise ValueError(f"{len(values)} columns instead of {columns}")
            pixels = [*values[:label], *values[label + 1 :]]
            if min(values) < 0 or max(pixels) > 255 or values[label] >= MOST_CLASSES:
                raise ValueError(f"a pixel outside 0 to 255 or a label outside 0 to {MOST_CLASSES - 1}")
        except (ValueError, OverflowError) as error:
            skipped[f"{path}:{number}"] = (str(error), 1)
            continue
        yield values


def _whole(cell: str) -> int:
    number = int(float(cell))
    if number != float(cell):
        raise ValueError(f"{cell.strip()} is no whole number")
    return number


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _square(pixels: int) -> tuple[int, int, int] | None:
    for channels in (1, 3) if pixels > 0 else ():
        side = round((pixels / channels) ** 0.5)
        if side and channels * side * side == pixels:
            return channels, side, side
    return None
