"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor


def synchronize(path: Path) -> None:
    """Waits until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a hidden path to write a file or a folder at, which takes the place of `path` at the end.

    An existing file is replaced; an existing folder must be moved away before. Nothing is left there where
    the body fails.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    try:
        yield partial
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise
    for file in [*partial.rglob("*"), partial]:
        synchronize(file)
    os.replace(partial, path)
    synchronize(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replaced(path) as partial:
        partial.write_bytes(content)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there; a folder vanishes at once, not file by file."""
    path = Path(path)
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.removed")
        if hidden != path:
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)
