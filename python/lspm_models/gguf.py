"""GGUF: the file of llama.cpp, one header, metadata and quantised tensors, read through a memory map.

Every count, length and offset is checked against the file before anything is read or allocated by it: what
reading takes is bounded by the file's size. Source: the specification in ggml's docs/gguf.md; blocks:
ggml-common.h, of which Q4_0, Q4_1 and Q8_0 hold 32 values each.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}  # struct's letters
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True)
class Kind:
    """How a tensor is stored: blocks of so many values in so many bytes."""

    name: str
    values: int
    bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    8: Kind("Q8_0", 32, 34),
    30: Kind("BF16", 1, 2),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its shape as torch has it, and its bytes."""

    kind: Kind
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """The metadata of a file, and its tensors one by one.

    Args:
        path: a .gguf file, version 2 or 3, little endian.

    Attributes:
        metadata: values by key; arrays of numbers are numpy's, arrays of texts are lists.
        tensors: where each lies, by name.

    Raises:
        ValueError: the file is no GGUF, damaged, or has a tensor of a kind that is not read; the message says
            what and where.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            # Copied on write, so that torch may have it; nothing is ever written.
            self._bytes = np.asarray(np.memmap(self.path, np.uint8, mode="c"))
        except FileNotFoundError:
            raise ValueError(f"gguf: {self.path} must be a GGUF file, got no such file") from None
        except ValueError:  # mmap's, of a file of no bytes
            raise ValueError(f"gguf: {self.path} must be a GGUF file, got an empty one") from None
        self._at = 0
        if self._take(4, "magic").tobytes() != MAGIC:
            self._refuse("magic must be GGUF", bytes(self._bytes[:4]))
        version = self._number("I", "version")
        if version not in VERSIONS:
            self._refuse("version must be 2 or 3, little endian", version)
        tensors = self._count(
            32, "number of tensors"
        )  # the least bytes that one has: name, dims, kind, offset
        fields = self._count(13, "number of metadata fields")
        self.metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text("metadata key")
            if key in self.metadata:
                self._refuse("metadata keys must differ", key)
            self.metadata[key] = self._value(self._number("I", f"type of {key}"), key)
        self.tensors = self._tensors(tensors)

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor in float32; one that is stored so is not copied.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.tensors:
            self._refuse("tensor must be in the file", name)
        stored = self.tensors[name]
        data = torch.from_numpy(self._bytes[stored.begin : stored.end])
        return _decoded(data, stored.kind).view(stored.shape)

    def _tensors(self, count: int) -> dict[str, Stored]:
        entries = [self._entry() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            self._refuse("general.alignment must be a positive multiple of 8", alignment)
        data, size = -(-self._at // alignment) * alignment, len(self._bytes)
        tensors: dict[str, Stored] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                self._refuse("names of tensors must differ", name)
            length, rest = divmod(math.prod(shape) * kind.bytes, kind.values)
            if rest or shape[-1] % kind.values:
                self._refuse(f"rows of {name} must be whole blocks of {kind.values}", shape)
            begin = data + offset
            if offset % alignment or begin + length > size:
                rule = (
                    f"offset of {name}, of {length} bytes, must be a multiple of {alignment} within the file"
                )
                self._refuse(rule, offset)
            tensors[name] = Stored(kind, shape, begin, begin + length)
        return tensors

    def _entry(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name = self._text("name of a tensor")
        dims = self._number("I", f"dimensions of {name}")
        if not 1 <= dims <= 4:
            self._refuse(f"dimensions of {name} must be 1 to 4", dims)
        shape = tuple(self._number("Q", f"shape of {name}") for _ in range(dims))[
            ::-1
        ]  # the last varies fastest
        if min(shape) < 1:
            self._refuse(f"shape of {name} must be positive", shape)
        kind = self._number("I", f"kind of {name}")
        if kind not in KINDS:
            known = ", ".join(f"{number} ({kind.name})" for number, kind in KINDS.items())
            self._refuse(f"kind of {name} must be one of {known}", kind)
        return name, shape, KINDS[kind], self._number("Q", f"offset of {name}")

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind], key)
        if kind == BOOL:
            return bool(self._number("B", key))
        if kind == STRING:
            return self._text(key)
        if kind != ARRAY:
            self._refuse(f"type of {key} must be 0 to 12", kind)
        kind = self._number("I", f"type of {key}")
        if kind == STRING:
            return [self._text(key) for _ in range(self._count(8, f"length of {key}"))]
        if kind not in (*SCALARS, BOOL):
            self._refuse(f"type of the items of {key} must be a number, a boolean or a text", kind)
        dtype = np.dtype("<" + SCALARS.get(kind, "?"))
        return self._take(self._count(dtype.itemsize, f"length of {key}") * dtype.itemsize, key).view(dtype)

    def _text(self, what: str) -> str:
        data = self._take(self._count(1, f"length of {what}"), what).tobytes()
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} must be UTF-8", data[:40])

    def _count(self, size: int, what: str) -> int:
        """Reads how many things of at least `size` bytes follow."""
        count, rest = self._number("Q", what), len(self._bytes) - self._at
        if count * size > rest:
            self._refuse(f"{what} must fit the {rest} bytes that follow", count)
        return count

    def _number(self, letter: str, what: str) -> int | float:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}"), what))[0]

    def _take(self, size: int, what: str) -> np.ndarray:
        end = self._at + size
        if end > len(self._bytes):
            self._refuse(f"{what} must be within the file", f"its end at byte {len(self._bytes)}")
        data = self._bytes[self._at : end]
        self._at = end
        return data

    def _refuse(self, rule: str, got: Any) -> NoReturn:
        got = got if isinstance(got, str) else repr(got)
        raise ValueError(f"gguf: {self.path}: {rule}, got {got[:80]} before byte {self._at}")


def _decoded(data: Tensor, kind: Kind) -> Tensor:
    if kind.values == 1:
        return data.view(
            {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
        ).float()
    blocks = data.view(-1, kind.bytes)

    def half(at: int) -> Tensor:  # (blocks, 1)
        return blocks[:, at : at + 2].contiguous().view(torch.float16).float()

    if kind.name == "Q8_0":  # scale, 32 bytes
        return blocks[:, 2:].contiguous().view(torch.int8) * half(0)
    nibbles = blocks[:, -16:]  # the low ones are the first 16 values
    values = torch.cat((nibbles & 15, nibbles >> 4), dim=1).float()
    if kind.name == "Q4_0":  # scale, 16 bytes
        return (values - 8) * half(0)
    return values * half(0) + half(2)  # Q4_1: scale, least value, 16 bytes
