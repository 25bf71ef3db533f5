"""Tokenizers that came with a model: byte-level BPE, special tokens and perhaps a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lspm_models.data.tokenizers import checked_ids, healed, with_spans, without_surrogates


@dataclass(frozen=True)
class Marks:
    """What a model was trained to read and write beside text.

    Args:
        vocabulary_size: ids of the model, which may be more than those of the tokenizer.
        end_of_text: ends a text.
        stops: tokens with which a model ends its answer, end_of_text among them.
        begin: the text of the token that begins a text, for the template; "" where there is none.
        template: Jinja's, from messages to text; None where the model does not chat.
    """

    vocabulary_size: int
    end_of_text: int
    stops: tuple[int, ...]
    begin: str = ""
    template: str | None = None


class PretrainedTokenizer:
    """A byte-level BPE tokenizer of the tokenizers library, and its model's marks.

    Args:
        tokenizer: with a byte-level decoder, whose texts join to the text of all ids.
        marks: see Marks.
        where: what messages call it.

    Raises:
        ValueError: it is of another kind, or has more ids than the model.
    """

    kind = "pretrained"

    def __init__(self, tokenizer: Any, marks: Marks, where: str) -> None:
        from tokenizers import decoders

        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            got = type(tokenizer.decoder).__name__
            raise ValueError(f"tokenizer: decoder of {where} must be ByteLevel, got {got}")
        self._size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self._size > marks.vocabulary_size:
            raise ValueError(
                f"tokenizer: ids of {where} must be below the model's {marks.vocabulary_size}, "
                f"got {self._size - 1}"
            )
        for token in marks.stops:
            if not 0 <= token < marks.vocabulary_size:
                raise ValueError(
                    f"tokenizer: end of text of {where} must be below {marks.vocabulary_size}, got {token}"
                )
        self._tokenizer, self.marks = tokenizer, marks
        self.vocabulary_size, self.end_of_text = marks.vocabulary_size, marks.end_of_text
        self.stops = marks.stops

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which the name of a special token is text too."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of several texts, each as an int64 array."""
        return self._encoded(texts, begun=False)

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns ids and their characters; those of one character's bytes all stand for it."""
        self._tokenizer.encode_special_tokens = True
        return with_spans(self._tokenizer, texts)

    def prompt(self, text: str | None) -> list[int]:
        """Returns the ids of a text behind what the model's texts begin with, if anything."""
        if text is not None:
            return self._encoded([text], begun=True)[0].tolist()
        begin = self._tokenizer.token_to_id(self.marks.begin)
        return [self.end_of_text if begin is None else begin]

    def chat(self, message: str, system: str | None = None) -> list[int]:
        """Returns the ids that ask a model for its answer to a message.

        As elsewhere, the template's text is tokenized as a whole: in the message, too, a special token's name
        is that token.

        Args:
            message: the user's.
            system: what the model shall be; None leaves it to the template.

        Raises:
            ValueError: there is no template, or it fails.
        """
        if self.marks.template is None:
            raise ValueError("chat: model must have a chat template, got none")
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": message})
        text = render(
            self.marks.template,
            messages,
            begin=self.marks.begin,
            end=self._tokenizer.id_to_token(self.end_of_text) or "",
        )
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; stops give nothing, half a character gives U+FFFD."""
        ids = checked_ids(ids, self.vocabulary_size)
        ids = [index for index in ids if index < self._size and index not in self.stops]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def healed(self, text: str) -> tuple[str, list[int]]:
        """See `tokenizers.healed`."""
        return healed(text, self._tokenizer)

    def to_json(self) -> dict:
        """Returns the tokenizer as the tokenizers library writes it, with its kind and marks."""
        return {
            "kind": self.kind,
            "tokenizer": json.loads(self._tokenizer.to_str()),
            "marks": asdict(self.marks),
        }

    @classmethod
    def from_json(cls, content: dict) -> PretrainedTokenizer:
        """Makes the tokenizer that to_json described."""
        marks = Marks(**{**content["marks"], "stops": tuple(content["marks"]["stops"])})
        return cls(parsed(json.dumps(content["tokenizer"]), "tokenizer"), marks, "tokenizer")

    def _encoded(self, texts: Sequence[str], begun: bool) -> list[np.ndarray]:
        self._tokenizer.encode_special_tokens = True  # not: read special tokens in a text
        encodings = self._tokenizer.encode_batch(
            [without_surrogates(text) for text in texts], add_special_tokens=begun
        )
        return [np.array(encoding.ids, np.int64) for encoding in encodings]


def render(template: str, messages: list[dict], *, begin: str, end: str) -> str:
    """Returns the text of a chat up to where the model answers.

    Jinja's sandbox keeps a template from Python's internals, and from changing anything; not from taking
    long.

    Raises:
        ValueError: the template is no template, fails, or refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    variables = {"messages": messages, "add_generation_prompt": True, "bos_token": begin, "eos_token": end}
    try:
        return environment.from_string(template).render(**variables)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"chat: template must render a message, got {error!r}") from None


def parsed(text: str, where: str) -> Any:
    """Makes the tokenizers library's object of its JSON.

    Raises:
        ValueError: it is none.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer: {where} must be a tokenizer's JSON, got {error}") from None


def byte_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], *, digits: bool, where: str) -> Any:
    """Makes GPT-2's kind of tokenizer.

    Args:
        vocabulary: id by token, in GPT-2's letters for bytes.
        merges: pairs of tokens, the first learned first.
        digits: every digit is a token, as in SmolLM.
        where: for messages.

    Raises:
        ValueError: a merge is of tokens, or to one, that the vocabulary lacks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    for pair in merges:
        for token in (*pair, "".join(pair)):
            if token not in vocabulary:
                raise ValueError(f"tokenizer: merges of {where} must be of tokens, got {token!r}")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
        if digits
        else by_bytes
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
