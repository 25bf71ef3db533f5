"""Questions about texts in SQuAD's format: from its JSON to windows of tokens and places of answers.

Source: Rajpurkar et al., Know What You Don't Know: Unanswerable Questions for SQuAD, 2018; windows: Devlin et
al., BERT, 2019, and its run_squad.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lspm_models.data.sequences import Sequences, begin_and_end
from lspm_models.data.tokenizers import Tokenizer, without_surrogates
from lspm_models.json_files import read_object

SEED = 0  # of what is set aside: no option, so that runs can be compared


@dataclass(frozen=True)
class Question:
    """A question, the text it is about, and where its answers begin there; without answers it has none."""

    name: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Windows:
    """Rows [begin] question [end] part of the context [end], and the way back to characters.

    Args:
        sequences: the rows; targets (N, 4) are the answer's first and last token, both 0 where the row does
            not hold it, and the first and last token of the context.
        question: (N,) which question each row belongs to.
        spans: N arrays (tokens of the row's context, 2) of characters in the context, from and to.
    """

    sequences: Sequences
    question: np.ndarray
    spans: Sequence[np.ndarray]


def read_questions(source: str) -> list[Question]:
    """Reads a JSON file in the format of SQuAD 1.1 or 2.0.

    Raises:
        ValueError: there is no such file, it has another format, a question or a context is empty, or an
            answer is not where the file says; the message names the place.
    """
    path = Path(source)
    content, found = read_object(path), []
    for article in _listed(content, "data", str(path)):
        title = article.get("title", "an article without title")
        for paragraph in _listed(article, "paragraphs", f"{title} in {path}"):
            context = _text(paragraph, "context", f"{title} in {path}")
            for item in _listed(paragraph, "qas", f"{title} in {path}"):
                found.append(_question(item, context, str(path)))
    if not found:
        raise ValueError(f"data: {path} must hold questions, got none")
    return found


def _question(item: dict, context: str, where: str) -> Question:
    name = str(item.get("id", "without id"))
    where = f"question {name} in {where}"
    question, answers, starts = _text(item, "question", where), [], []
    for answer in [] if item.get("is_impossible") else _listed(item, "answers", where):
        text, start = _text(answer, "text", where), answer.get("answer_start")
        if type(start) is not int or start < 0 or context[start : start + len(text)] != text:
            got = context[start : start + len(text)] if type(start) is int and start >= 0 else start
            raise ValueError(f"data: answer_start of {where} must be where {text!r} stands, got {got!r}")
        answers.append(text)
        starts.append(start)
    return Question(name, question, context, tuple(answers), tuple(starts))


def _listed(content: dict, name: str, where: str) -> list[dict]:
    items = content.get(name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"data: {name} of {where} must be a list of objects, got {_short(items)}")
    return items


def _text(content: dict, name: str, where: str) -> str:
    text = content.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"data: {name} of {where} must be a text that is not empty, got {_short(text)}")
    return without_surrogates(text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def set_aside(questions: Sequence[Question], share: float) -> tuple[list[Question], list[Question]]:
    """Splits questions into those to train on and those about a share of the contexts."""
    contexts = list(dict.fromkeys(item.context for item in questions))
    aside = set(random.Random(SEED).sample(contexts, int(len(contexts) * share + 1e-9)))
    parts: tuple[list[Question], list[Question]] = ([], [])
    for item in questions:
        parts[item.context in aside].append(item)
    return parts


def windows(questions: Sequence[Question], tokenizer: Tokenizer, *, length: int, stride: int) -> Windows:
    """Makes the rows of questions: a context that does not fit one row has several.

    Args:
        questions: of each the first answer is the target.
        tokenizer: what encodes them.
        length: tokens of a row at most.
        stride: tokens from one row of a context to the next, at most; no token is left out.

    Raises:
        ValueError: a question leaves no room for its context, or stride is less than 1.
    """
    if stride < 1:
        raise ValueError(f"data: stride must be at least 1, got {stride}")
    begin, end = begin_and_end(tokenizer)
    contexts = dict.fromkeys(item.context for item in questions)
    contexts = dict(zip(contexts, tokenizer.encode_with_spans(list(contexts)), strict=True))
    asked = tokenizer.encode_batch([item.question for item in questions])
    tokens, targets, owners, spans = [], [], [], []
    for index, (item, question) in enumerate(zip(questions, asked, strict=True)):
        ids, places = contexts[item.context]
        before = np.concatenate([begin, question, end]).astype(np.int32)
        room = length - len(before) - len(end)
        if room < 1:
            raise ValueError(
                f"data: question {item.name} must leave room in {length} tokens, got {len(question)} itself"
            )
        answer = answer_tokens(places, item.starts[0], item.answers[0]) if item.answers else None
        first = 0
        while True:
            part = ids[first : first + room]
            tokens.append(np.concatenate([before, part, end]).astype(np.int32))
            offset = len(before) - first
            inside = answer is not None and first <= answer[0] and answer[1] < first + len(part)
            start, stop = (answer[0] + offset, answer[1] + offset) if inside else (0, 0)
            targets.append((start, stop, len(before), len(before) + len(part) - 1))
            owners.append(index)
            spans.append(places[first : first + room])
            if first + room >= len(ids):
                break
            first += min(stride, room)
    rows = Sequences(tokens, np.array(targets, np.int64).reshape(-1, 4))
    return Windows(rows, np.array(owners, np.int64), spans)


def answer_tokens(places: np.ndarray, start: int, answer: str) -> tuple[int, int]:
    """Returns the first and the last token that hold a character of an answer.

    Args:
        places: (T, 2) of the tokens' characters, from and to.
        start: where the answer begins.
        answer: its text.
    """
    first = int(np.searchsorted(places[:, 1], start, side="right"))
    last = int(np.searchsorted(places[:, 0], start + len(answer), side="left")) - 1
    return min(first, len(places) - 1), max(first, last)
