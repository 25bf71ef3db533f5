"""Token files: one line of JSON, then the ids as they lie in memory; read through a memory map.

The training part comes first and the validation part last, so one file, one rename, holds the whole corpus.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lspm_models.data.corpus import Corpus, Document
from lspm_models.data.tokenizers import Tokenizer, batches
from lspm_models.files import replaced

HEADER = 512  # bytes of the JSON line, padded, so that the ids are aligned
BATCH = 32  # pieces encoded at once: 2 MB of text, enough for every core; more only costs memory


@dataclass(frozen=True)
class Tokens:
    """The ids of a corpus, where its validation part begins, and the hash of what they were made from."""

    ids: np.ndarray
    boundary: int
    fingerprint: str


def tokens_for(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    validation: float,
    split: str,
    report: Callable[[str], None] = lambda line: None,
) -> Tokens:
    """Opens the ids of a corpus, encoding it first unless the folder holds them already.

    Args:
        corpus: the text.
        tokenizer: what encodes it.
        folder: where token files lie, each named by the hash of the text, the tokenizer and the split.
        validation: share of the corpus to validate on, 0 to less than 1.
        split: "document" sets whole documents aside, evenly spread over the corpus; "tail" the end of the
            text; "auto" takes documents where there are enough of them for at least one.
        report: takes a line for the reader when something is written.

    Raises:
        ValueError: split is "document" and the corpus has too few documents.
    """
    held_out = int(len(corpus.documents) * validation)
    if split == "document" and validation and not held_out:
        raise ValueError(
            f"corpus: split=document must have at least {math.ceil(1 / validation)} documents "
            f"to set {validation:g} of them aside, got {len(corpus.documents)}"
        )
    by_document = held_out > 0 and split != "tail"
    recipe = json.dumps([corpus.fingerprint(), tokenizer.to_json(), validation, by_document], sort_keys=True)
    fingerprint = hashlib.blake2b(recipe.encode(), digest_size=16).hexdigest()
    path = Path(folder) / f"{fingerprint}.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        training, held_out = _split(corpus.documents, validation if by_document else 0.0)
        count = _write(path, tokenizer, training, held_out, None if by_document else validation)
        report(f"encoded    {count:,} tokens, {corpus.size / max(count, 1):.2f} bytes each")
    return _open(path, fingerprint)


def _split(documents: Iterable[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Sets every (1 / share)-th document aside."""
    training, held_out = [], []
    for index, document in enumerate(documents):
        (held_out if int((index + 1) * share) > int(index * share) else training).append(document)
    return training, held_out


def _write(
    path: Path, tokenizer: Tokenizer, training: list[Document], held_out: list[Document], tail: float | None
) -> int:
    """Writes the ids of both parts and returns their number."""
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.uint32)
    with replaced(path) as partial, partial.open("wb") as file:
        file.write(b" " * HEADER)
        count = boundary = _encode(file, tokenizer, training, dtype)
        count += _encode(file, tokenizer, held_out, dtype)
        if tail is not None:
            boundary = count - int(count * tail)
        header = {"format": "lspm tokens 1", "dtype": dtype.name, "tokens": count, "training": boundary}
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
    return count


def _encode(file, tokenizer: Tokenizer, documents: Iterable[Document], dtype: np.dtype) -> int:
    """Appends the ids of documents, each with end_of_text behind it, and returns their number."""
    pieces = ((piece, last) for document in documents for piece, last in _marked(document.pieces()))
    end, count = np.array([tokenizer.end_of_text], dtype), 0
    for batch in batches(pieces, BATCH):
        for ids, (_, last) in zip(tokenizer.encode_batch([piece for piece, _ in batch]), batch, strict=True):
            file.write(ids.astype(dtype).tobytes() + (end.tobytes() if last else b""))
            count += len(ids) + last
    return count


def _marked(pieces: Iterable[str]) -> Iterable[tuple[str, bool]]:
    """Yields every piece with whether it is the last one."""
    iterator = iter(pieces)
    piece = next(iterator, "")
    for following in iterator:
        yield piece, False
        piece = following
    yield piece, True


def _open(path: Path, fingerprint: str) -> Tokens:
    with path.open("rb") as file:
        header = json.loads(file.read(HEADER))
    ids = np.memmap(path, header["dtype"], mode="r", offset=HEADER, shape=(header["tokens"],))
    return Tokens(ids, header["training"], fingerprint)
