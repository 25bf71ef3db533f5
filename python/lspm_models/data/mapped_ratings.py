"""Ratings on disk for stochastic gradient descent: sorted once, then read page by page.

A folder holds users.bin, items.bin, ratings.bin and, where ratings have weights, weight.bin: little-endian
int32 and float32 in the order of their blocks, and blocks.safetensors that says where these begin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lspm_kernels import RatingBlocks, rating_blocks
from lspm_models.checkpoint import read_tensors
from lspm_models.files import remove, replaced, write_tensors

COLUMNS = {"users": torch.int32, "items": torch.int32, "ratings": torch.float32, "weight": torch.float32}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BYTES = 4


def write_ratings(
    folder: Path | str,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    num_users: int | None = None,
    num_items: int | None = None,
    grid: int | None = None,
) -> RatingBlocks:
    """Writes ratings that come in batches, sorts them into blocks, and opens them.

    Takes twice the room on disk that it leaves filled, 12 or 16 bytes a rating, and little memory of its own.

    Args:
        folder: to write to; what it held of ratings is replaced in the end.
        batches: of users (n,), items (n,), ratings (n,) and, in all or none, weights (n,), as tensors, arrays
            or lists.
        num_users, num_items, grid: as rating_blocks() takes them.

    Raises:
        ValueError: as rating_blocks(); or there are no ratings, or batches differ in kind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder / "blocks.safetensors").is_file() and any(folder.iterdir()):
        raise ValueError(f"ratings: {folder} must be new, empty or a folder of ratings, got other files")
    with replaced(folder) as partial:
        unsorted = partial / "unsorted"
        unsorted.mkdir(parents=True)
        count, names = _append(unsorted, batches)
        given = [_mapped(unsorted / f"{name}.bin", COLUMNS[name], count) for name in names]
        out = [_mapped(partial / f"{name}.bin", COLUMNS[name], count, shared=True) for name in names]
        out += [None] * (4 - len(out))
        blocks = rating_blocks(*given, num_users=num_users, num_items=num_items, grid=grid, out=tuple(out))
        tensors = {name: getattr(blocks, name) for name in ("offsets", "part_items", "part_offsets")}
        tensors["sizes"] = torch.tensor([blocks.num_users, blocks.num_items, count, len(names)])
        write_tensors(tensors, partial / "blocks.safetensors")
        del given, out, blocks
        remove(unsorted)
        remove(folder)
    return open_ratings(folder)


def open_ratings(folder: Path | str) -> RatingBlocks:
    """Opens what write_ratings() wrote; pages are read when they are needed, and never written.

    Raises:
        ValueError: it is not there, or damaged.
    """
    folder = Path(folder)
    tensors = read_tensors(folder / "blocks.safetensors")
    try:
        num_users, num_items, count, columns = tensors.pop("sizes").tolist()
        names = list(COLUMNS)[:columns]
        for name in names:
            size = (folder / f"{name}.bin").stat().st_size
            if size != BYTES * count:
                raise ValueError(f"{name}.bin must have {BYTES * count} bytes, got {size}")
        mapped = [_mapped(folder / f"{name}.bin", COLUMNS[name], count) for name in names]
        mapped += [None] * (4 - len(mapped))
        return RatingBlocks(*mapped, **tensors, num_users=num_users, num_items=num_items)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"ratings: {folder} must hold what write_ratings wrote, got {error}") from error


def _append(folder: Path, batches: Iterable[tuple[Tensor, ...]]) -> tuple[int, list[str]]:
    """Writes the columns of all batches one after another; returns how many ratings, and which columns."""
    count, names = 0, []
    for given in batches:
        batch = [torch.as_tensor(column).detach() for column in given]
        if names and len(batch) != len(names):
            raise ValueError(f"ratings: batches must all have {len(names)} columns, got {len(batch)}")
        if len(batch) not in (3, 4) or {tuple(t.shape) for t in batch} != {(batch[0].numel(),)}:
            got = [tuple(column.shape) for column in batch]
            raise ValueError(f"ratings: a batch must be 3 or 4 columns of one length, got {got}")
        names = list(COLUMNS)[: len(batch)]
        for name, column in zip(names, batch, strict=True):
            of_ids, low, high = COLUMNS[name] == torch.int32, -(2**31), 2**31 - 1
            if of_ids and column.dtype not in INTEGERS:
                raise ValueError(f"ratings: {name} must be integers, got {column.dtype}")
            if of_ids and len(column) and not low <= column.min() <= column.max() <= high:
                raise ValueError(f"ratings: {name} must fit 32 bits, got {column.min()} to {column.max()}")
            with (folder / f"{name}.bin").open("ab") as file:
                file.write(column.to(COLUMNS[name]).contiguous().numpy().tobytes())
        count += len(batch[0])
    if not count:
        raise ValueError("ratings: batches must hold at least one rating, got none")
    return count, names


def _mapped(path: Path, dtype: torch.dtype, count: int, *, shared: bool = False) -> Tensor:
    if sys.byteorder != "little":
        raise ValueError("ratings: files are little-endian, and so must be the machine, got a big-endian one")
    return torch.from_file(str(path), shared=shared, size=count, dtype=dtype)
