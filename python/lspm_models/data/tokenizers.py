"""Tokenizers with one interface, saved as JSON: byte-level BPE, and characters for tiny or Chinese text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lspm_models.files import write_atomically

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What a tokenizer offers. `end_of_text` stands between documents; encoding text never yields it."""

    vocabulary_size: int
    end_of_text: int
    stops: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of several texts, in parallel where that helps."""

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns ids (T,) and their characters (T, 2), from and to, in without_surrogates(text)."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; end_of_text gives nothing, half a character gives U+FFFD."""

    def prompt(self, text: str | None) -> list[int]:
        """Returns what a model continues: a text's ids, or those that begin a new text."""

    def healed(self, text: str) -> tuple[str, list[int]]:
        """Returns a prompt and ids, of which the next must be one where there are any: see `healed`."""

    def chat(self, message: str, system: str | None = None) -> list[int]:
        """Returns what a model answers to a message behind; a ValueError where it does not chat."""

    def to_json(self) -> dict:
        """Returns all there is to know, as `from_json` takes it."""


class Unmarked:
    """A tokenizer whose only mark is end_of_text, which a new text follows; nothing chats."""

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids with which a model ends."""
        return (self.end_of_text,)

    def chat(self, message: str, system: str | None = None) -> list[int]:
        """Raises ValueError."""
        raise ValueError("chat: model must have a chat template, got none")

    def prompt(self, text: str | None) -> list[int]:
        """Returns the ids of a text, or end_of_text to begin a new one."""
        return [self.end_of_text] if text is None else self.encode(text)

    def healed(self, text: str) -> tuple[str, list[int]]:
        """Returns the text and no ids: no token stands for more than a character."""
        return text, []


class ByteBpe(Unmarked):
    """Byte-level byte pair encoding, as GPT-2 has it: every text has ids, and decoding gives it back.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.2.
    """

    kind = "byte_bpe"

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end_of_text = tokenizer.get_vocab_size()
        self.vocabulary_size = self.end_of_text + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> ByteBpe:
        """Learns merges from texts until the vocabulary is full or no pair of tokens occurs twice.

        Args:
            texts: the sample to learn from.
            vocabulary_size: ids at most, with the 256 bytes and end_of_text.

        Raises:
            ValueError: vocabulary_size is too small for every byte.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocabulary_size < 257:
            raise ValueError(
                "tokenizer: vocabulary_size must be at least 257 (every byte and end of text), "
                f"got {vocabulary_size}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(without_surrogates, texts), trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; a surrogate pair counts as its character, a lone surrogate as U+FFFD."""
        return self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of several texts, each as an int64 array."""
        encodings = self._tokenizer.encode_batch(
            [without_surrogates(text) for text in texts], add_special_tokens=False
        )
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns ids and their characters; those of one character's bytes all stand for it."""
        return with_spans(self._tokenizer, texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; end_of_text gives nothing, half a character gives U+FFFD."""
        ids = checked_ids(ids, self.vocabulary_size)
        return self._tokenizer.decode(
            [index for index in ids if index != self.end_of_text], skip_special_tokens=False
        )

    def healed(self, text: str) -> tuple[str, list[int]]:
        """See `healed`."""
        return healed(text, self._tokenizer)

    def to_json(self) -> dict:
        """Returns the tokenizer as the tokenizers library writes it, with its kind."""
        return {"kind": self.kind, "tokenizer": json.loads(self._tokenizer.to_str())}

    @classmethod
    def from_json(cls, content: dict) -> ByteBpe:
        """Makes the tokenizer that to_json described."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(json.dumps(content["tokenizer"])))


class Characters(Unmarked):
    """One id per character of the training text; id 0 is every other character and decodes to U+FFFD."""

    kind = "characters"

    def __init__(self, characters: str) -> None:
        self._characters = UNKNOWN + characters
        self.end_of_text = len(self._characters)
        self.vocabulary_size = self.end_of_text + 1
        self._ids = np.zeros(0x110000, np.int64)  # 0, unknown, for every code point that is not named
        self._ids[_code_points(characters)] = np.arange(1, self.end_of_text)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Characters:
        """Takes the most frequent characters of the texts, ties in the order of their code points.

        Args:
            texts: the text to learn from.
            vocabulary_size: ids at most, with unknown and end_of_text.

        Raises:
            ValueError: vocabulary_size leaves no room for a character.
        """
        if vocabulary_size < 3:
            raise ValueError(
                "tokenizer: vocabulary_size must be at least 3 (unknown, a character, end of text), "
                f"got {vocabulary_size}"
            )
        counts = Counter()
        for text in texts:
            counts.update(without_surrogates(text))
        counts.pop(UNKNOWN, None)
        ranked = sorted(counts, key=lambda character: (-counts[character], character))
        return cls("".join(ranked[: vocabulary_size - 2]))

    def encode(self, text: str) -> list[int]:
        """Returns one id per character; a surrogate pair is its character, a lone surrogate is unknown."""
        return self._ids[_code_points(without_surrogates(text))].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of several texts, each as an int64 array."""
        return [self._ids[_code_points(without_surrogates(text))] for text in texts]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns ids and their characters, one each."""
        ids = self.encode_batch(texts)
        return [(row, np.arange(len(row))[:, None] + np.arange(2)) for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; end_of_text gives nothing, unknown gives U+FFFD."""
        ids = checked_ids(ids, self.vocabulary_size)
        return "".join(self._characters[index] for index in ids if index != self.end_of_text)

    def to_json(self) -> dict:
        """Returns the characters in the order of their ids, from id 1."""
        return {"kind": self.kind, "characters": self._characters[1:]}

    @classmethod
    def from_json(cls, content: dict) -> Characters:
        """Makes the tokenizer that to_json described."""
        return cls(content["characters"])


KINDS = {"bpe": ByteBpe, "character": Characters}


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a tokenizer as JSON, whole or not at all."""
    write_atomically(path, json.dumps(tokenizer.to_json(), ensure_ascii=False).encode())


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer that save_tokenizer wrote.

    Raises:
        ValueError: there is no such file, or it is no tokenizer.
    """
    from lspm_models.data.mask_tokenizer import MaskTokenizer  # which are made of what is above
    from lspm_models.data.pretrained_tokenizer import PretrainedTokenizer

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        kinds = {kind.kind: kind for kind in (*KINDS.values(), PretrainedTokenizer, MaskTokenizer)}
        return kinds[content["kind"]].from_json(content)
    except FileNotFoundError as error:
        raise ValueError(f"load_tokenizer: {path} must be a tokenizer file, got no such file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_tokenizer: {path} must be a tokenizer file, got {error!r:.120}") from error


def healed(text: str, tokenizer) -> tuple[str, list[int]]:
    """Takes back the space a prompt ends with: byte-level tokens begin with it, so alone it is rarely seen.

    Args:
        text: a prompt.
        tokenizer: byte-level, of the tokenizers library.

    Returns:
        The prompt without its last space and the ids of all tokens that begin with a space; the prompt and no
        ids where it does not end with one or is nothing else.

    Source: guidance's "token healing" (2023).
    """
    beginning = sorted(index for token, index in tokenizer.get_vocab().items() if token.startswith("Ġ"))
    return (text[:-1], beginning) if text[1:].endswith(" ") and beginning else (text, [])


def without_surrogates(text: str) -> str:
    """Returns text that UTF-8 can hold: a surrogate pair becomes its character, a lone surrogate U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def with_spans(tokenizer: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the ids and the spans that a tokenizer of the tokenizers library makes of texts."""
    texts = [without_surrogates(text) for text in texts]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [(np.array(e.ids, np.int64), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]


def batches(items: Iterable, size: int) -> Iterable[list]:
    """Yields lists of `size` items in order, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def checked_ids(ids: Iterable[int], vocabulary_size: int) -> list[int]:
    """Returns ids as a list; ValueError unless all are of the vocabulary."""
    ids = [int(index) for index in ids]
    for index in ids:
        if not 0 <= index < vocabulary_size:
            raise ValueError(f"decode: ids must lie in 0..{vocabulary_size - 1}, got {index}")
    return ids
