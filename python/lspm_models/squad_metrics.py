"""How right answers are, as SQuAD's evaluation script computes it.

Source: evaluate-v2.0.py of Rajpurkar et al., Know What You Don't Know, 2018.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(answer: str) -> str:
    """Returns an answer in small letters without punctuation and articles, one space between words."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(given: str, answer: str) -> float:
    """Returns 1 where both are the same when normalised, else 0."""
    return float(normalised(given) == normalised(answer))


def f1(given: str, answer: str) -> float:
    """Returns the harmonic mean of precision and recall of the words; of no words 1 where both have none."""
    ours, theirs = normalised(given).split(), normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def scores(given: Sequence[str], answers: Sequence[Sequence[str]]) -> list[tuple[float, float]]:
    """Returns exact match and F1 of each answer given, each against the best of those that are right.

    Args:
        given: N answers, "" for none.
        answers: the right ones of each question; of a question without one, none.
    """
    found = []
    for ours, texts in zip(given, answers, strict=True):
        right = [text for text in texts if normalised(text)] or [""]
        found.append((max(exact_match(ours, text) for text in right), max(f1(ours, text) for text in right)))
    return found
