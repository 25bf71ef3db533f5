"""Tokenizers of encoders: WordPiece, byte-level BPE or characters, with tokens that hide, begin and end."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lspm_models.data.pretrained_tokenizer import parsed
from lspm_models.data.tokenizers import ByteBpe, Characters, checked_ids, with_spans, without_surrogates

PADDING, UNKNOWN, BEGIN, SEPARATOR, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
# What a token begins or ends with: APART joins nothing, CONTINUES belongs to the token before.
APART, LETTER, DIGIT, CONTINUES = range(4)
# Thai and Lao, Myanmar, Khmer, kana and Han.
WITHOUT_SPACES = tuple(
    range(*ends)
    for ends in (
        (0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x3400, 0xA000),
        (0xF900, 0xFB00), (0x20000, 0x40000),
    )
)  # fmt: skip


@dataclass(frozen=True)
class MaskMarks:
    """The ids that are no text.

    Args:
        vocabulary_size: ids of the model, which may be more than those of the tokenizer.
        padding: fills rows of unequal texts.
        begin: stands before a text.
        separator: stands behind a text, and between parts of one.
        mask: stands where a token is hidden.
        unknown: stands for what has no id; None where all has.
    """

    vocabulary_size: int
    padding: int
    begin: int
    separator: int
    mask: int
    unknown: int | None = None


class MaskTokenizer:
    """A tokenizer of the tokenizers library, and its model's marks.

    Args:
        tokenizer: WordPiece, byte-level BPE, or characters (WordLevel).
        marks: see MaskMarks.
        where: what messages call it.

    Raises:
        ValueError: it is of another kind, or an id is not below the model's.
    """

    kind = "with_masks"

    def __init__(self, tokenizer: Any, marks: MaskMarks, where: str) -> None:
        from tokenizers import decoders

        model = type(tokenizer.model).__name__
        by_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
        if model not in ("WordPiece", "WordLevel") and not (model == "BPE" and by_bytes):
            rule = "WordPiece, WordLevel or byte-level BPE"
            raise ValueError(f"tokenizer: model of {where} must be {rule}, got {model}")
        self._vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        most = max((*self._vocabulary.values(), *self._ids(marks)), default=-1)
        if most >= marks.vocabulary_size:
            raise ValueError(
                f"tokenizer: ids of {where} must be below the model's {marks.vocabulary_size}, got {most}"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self._model, self.marks = tokenizer, model, marks
        self.vocabulary_size, self.end_of_text = marks.vocabulary_size, marks.separator
        self.stops = (marks.separator,)

    @classmethod
    def of(cls, tokenizer: ByteBpe | Characters) -> MaskTokenizer:
        """Adds the marks to a tokenizer of ours, behind its ids; the separator is its end_of_text."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

        content, unknown = tokenizer.to_json(), None
        if isinstance(tokenizer, ByteBpe):
            inner = parsed(json.dumps(content["tokenizer"]), "tokenizer")
        else:
            characters, unknown = tokenizer.decode([0]) + content["characters"], 0
            vocabulary = {character: index for index, character in enumerate(characters)}
            inner = Tokenizer(models.WordLevel(vocabulary, unk_token=characters[0]))
            inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            inner.decoder = decoders.Fuse()
        inner.add_special_tokens([SEPARATOR, PADDING, BEGIN, MASK])
        separator, padding, begin, mask = range(tokenizer.end_of_text, tokenizer.end_of_text + 4)
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {SEPARATOR}",
            pair=f"{BEGIN} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
            special_tokens=[(BEGIN, begin), (SEPARATOR, separator)],
        )
        return cls(inner, MaskMarks(mask + 1, padding, begin, separator, mask, unknown), "tokenizer")

    @property
    def mask_name(self) -> str:
        """What stands in a text for a hidden token."""
        return self._tokenizer.id_to_token(self.marks.mask)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which the name of a special token is text too."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of several texts, each as an int64 array, without marks around them."""
        self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch(
            [without_surrogates(text) for text in texts], add_special_tokens=False
        )
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns ids and their characters; those of one character's bytes all stand for it."""
        self._tokenizer.encode_special_tokens = True
        return with_spans(self._tokenizer, texts)

    def encode_masked(self, text: str) -> list[int]:
        """Returns the ids of a text in which every mask_name hides a token, between the marks of a text.

        Where byte-level tokens begin with the space before them, so does a hidden one.
        """
        parts = text.split(self.mask_name)
        if self._model == "BPE":
            parts = [part.removesuffix(" ") for part in parts[:-1]] + parts[-1:]
        ids = [self.marks.begin]
        for index, part in enumerate(self.encode_batch(parts)):
            ids += [self.marks.mask] * (index > 0) + part.tolist()
        return [*ids, self.marks.separator]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; marks give nothing, half a character gives U+FFFD."""
        left_out = set(self._ids(self.marks)) - {self.marks.unknown}
        ids = [index for index in checked_ids(ids, self.vocabulary_size) if index not in left_out]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, text: str | None) -> list[int]:
        """Raises ValueError."""
        raise ValueError("prompt: model must continue texts, got one that fills masks")

    def chat(self, message: str, system: str | None = None) -> list[int]:
        """Raises ValueError."""
        raise ValueError("chat: model must have a chat template, got none")

    @cached_property
    def special(self) -> np.ndarray:
        """(V,) bool: ids that are never hidden, and never stand for one that is."""
        special = np.ones(self.vocabulary_size, bool)  # what has no token is no text either
        special[list(self._vocabulary.values())] = False
        special[self._ids(self.marks)] = True
        return special

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(V,) int8 twice: what each token begins with, and what it ends with; see joins."""
        edges = np.zeros((2, self.vocabulary_size), np.int8)
        for token, index in self._vocabulary.items():
            if not self.special[index]:
                edges[:, index] = self._edges(token)
        return edges[0], edges[1]

    def joins(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) bool of ids (B, T): whether a token is of the same word as the token before it.

        A word of WordPiece is a token and those behind it that continue it ("##"). Of byte-level BPE and of
        characters it is a run of letters or a run of digits, with the space before it that its first token
        has; any other token is a word of its own, and so is a character of Chinese or Japanese, which put no
        spaces between words.
        """
        first, last = (edge[ids] for edge in self.edges)
        same = (first[:, 1:] == last[:, :-1]) & (first[:, 1:] != APART)
        joined = np.zeros(ids.shape, bool)
        joined[:, 1:] = (same | (first[:, 1:] == CONTINUES)) & ~self.special[ids[:, :-1]]
        return joined

    def to_json(self) -> dict:
        """Returns the tokenizer as the tokenizers library writes it, with its kind and marks."""
        return {
            "kind": self.kind,
            "tokenizer": json.loads(self._tokenizer.to_str()),
            "marks": asdict(self.marks),
        }

    @classmethod
    def from_json(cls, content: dict) -> MaskTokenizer:
        """Makes the tokenizer that to_json described."""
        tokenizer = parsed(json.dumps(content["tokenizer"]), "tokenizer")
        return cls(tokenizer, MaskMarks(**content["marks"]), "tokenizer")

    @staticmethod
    def _ids(marks: MaskMarks) -> list[int]:
        ids = marks.padding, marks.begin, marks.separator, marks.mask, marks.unknown
        return [index for index in ids if index is not None]

    def _edges(self, token: str) -> tuple[int, int]:
        if self._model == "WordPiece":
            prefix = self._tokenizer.model.continuing_subword_prefix
            return (CONTINUES if token.startswith(prefix) else APART), APART
        if self._model == "WordLevel":
            return _class_of(token[0]), _class_of(token[-1])
        data = bytes(BYTES[letter] for letter in token if letter in BYTES)
        return _first(data), _last(data)


def _class_of(character: str) -> int:
    """LETTER and DIGIT of scripts that put spaces between words."""
    kind = unicodedata.category(character)
    if kind.startswith("N"):
        return DIGIT
    return LETTER if kind[0] in "LM" and not any(ord(character) in span for span in WITHOUT_SPACES) else APART


def _first(data: bytes) -> int:
    if not data or data[0] == 0x20:
        return APART
    if 0x80 <= data[0] < 0xC0:  # within a character
        return CONTINUES
    return _whole(data[: _length(data[0])], data[0])


def _last(data: bytes) -> int:
    start = max((i for i, byte in enumerate(data) if not 0x80 <= byte < 0xC0), default=None)
    if start is None:
        return LETTER if data else APART  # the end of a character
    return _whole(data[start:], data[start])


def _whole(data: bytes, lead: int) -> int:
    """The class of a character, or of a cut one: those of two bytes are letters mostly."""
    try:
        return _class_of(data.decode())
    except UnicodeDecodeError:
        return LETTER if _length(lead) == 2 else APART


def _length(lead: int) -> int:
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _letters_of_bytes() -> dict[str, int]:
    """Byte by the letter that stands for it in byte-level vocabularies: itself where it prints."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _letters_of_bytes()
