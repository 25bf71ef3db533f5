"""What a run goes on from, its state.json, which someone may have changed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COUNTS, NUMBERS = ("step", "tokens"), ("seconds", "train_loss", "validation_loss")


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Within, what the state of a checkpoint lacks, or has of another kind, is a ValueError that names it."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(("checkpoint: ", "json: ")):
            raise  # as it names the file
        got = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"checkpoint: {_file(path)} must be as it was written, got {got}") from error


def checked(state: dict, path: Path) -> dict:
    """Returns the state of a checkpoint; a ValueError unless it has the numbers that a run counts on from."""
    for name in (*COUNTS, *NUMBERS):
        value, counts = state.get(name), name in COUNTS
        if not _is_number(value) or (counts and not (isinstance(value, int) and value >= 0)):
            rule = "a whole number from 0 on" if counts else "a number"
            raise ValueError(f"checkpoint: {_file(path)} must have {rule} as {name}, got {value!r}")
    recent = state.get("recent", [0, 0])  # older checkpoints have none
    if not isinstance(recent, list) or len(recent) != 2 or not all(map(_is_number, recent)):
        raise ValueError(f"checkpoint: {_file(path)} must have two numbers as recent, got {recent!r}")
    return state


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _file(path: Path) -> Path:
    return Path(path) / "state.json"
