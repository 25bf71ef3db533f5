"""From what a model with a head for whole texts gives to what a person reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.labelled_texts import Labelled
from lspm_models.data.questions import Question, Windows, windows
from lspm_models.data.sequences import SequenceData, encode_texts, padded
from lspm_models.data.tokenizers import Tokenizer, without_surrogates
from lspm_models.files import replaced
from lspm_models.image_outputs import confusion, most_probable
from lspm_models.squad_metrics import scores
from lspm_models.tasks.question_answering import QuestionAnswering, best_spans
from lspm_models.tasks.sequence_classification import SequenceClassification

MOST_LABELS = 20  # beyond, a line for each is no help
BATCH = 32


def device_of(task: torch.nn.Module) -> torch.device:
    """Returns where a task is."""
    return next(task.parameters()).device


@torch.no_grad()
def report_texts(
    task: SequenceClassification,
    data: SequenceData,
    texts: Sequence[Labelled],
    labels: Sequence[str],
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Classifies the texts set aside, says how well, and writes mistakes.tsv.

    Args:
        task: a trained one; it is left in eval mode.
        data: what it was trained with.
        texts: those set aside.
        labels: of the classes.
        folder: the run folder.
        report: takes lines for the reader.
    """
    task.eval()
    probabilities = torch.zeros(len(texts), len(labels))
    truth = torch.zeros(len(texts), dtype=torch.int64)
    for places, tokens, targets in data.all_held_out():
        probabilities[places] = task(tokens.to(device_of(task))).float().softmax(1).cpu()
        truth[places] = targets
    predicted = probabilities.argmax(1)
    counts = confusion(predicted, truth, len(labels))
    measured = task.metrics(counts.flatten().tolist())
    wrong = (predicted != truth).nonzero()[:, 0]
    report(
        f"accuracy   {measured['accuracy']:.2%} of {len(texts):,} texts set aside, {len(wrong):,} wrong; "
        f"F1 {measured['f1']:.4f}"
    )
    if len(labels) <= MOST_LABELS:
        for label, (right, given, there) in zip(labels, _of_classes(counts), strict=True):
            parts = f"precision {_share(right, given)}, recall {_share(right, there)} of {there:,}"
            report(f"label      {label}: {parts}")
    order = wrong[probabilities[wrong].amax(1).argsort(descending=True, stable=True)].tolist()
    with replaced(folder / "mistakes.tsv") as partial, partial.open("w", encoding="utf-8") as file:
        file.write("label\tpredicted\tprobability\ttext\n")
        for place in order:
            text = " ".join(texts[place].text.split())
            given = labels[predicted[place]], f"{probabilities[place, predicted[place]]:.3f}"
            file.write("\t".join((texts[place].label, *given, text)) + "\n")
    report(f"mistakes   {folder}/mistakes.tsv, the surest first")


def _of_classes(counts: Tensor) -> list[list[int]]:
    """Returns for each class how many texts are rightly, at all, and should be given it."""
    return torch.stack([counts.diagonal(), counts.sum(0), counts.sum(1)], 1).tolist()


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


@torch.no_grad()
def classify(
    task: SequenceClassification, tokenizer: Tokenizer, labels: Sequence[str], text: str, top: int
) -> tuple[list[tuple[str, float]], int]:
    """Returns the most probable labels of a text with their probabilities, the best first, and how many of
    its last tokens the model's context had no room for.

    Raises:
        ValueError: the text is empty.
    """
    if not text.strip():
        raise ValueError("text must not be empty, got nothing")
    rows, (cut,) = encode_texts([text.strip()], tokenizer, task.config.context)
    return most_probable(task(padded(rows).to(device_of(task))), labels, top)[0], cut


@torch.no_grad()
def answers(
    task: QuestionAnswering, questions: Sequence[Question], found: Windows, none: bool
) -> list[tuple[str, float]]:
    """Returns the best answer to each question, "" for none, and its probability in its window.

    Args:
        task: in eval mode.
        questions: N.
        found: their windows, at least one of each.
        none: whether there may be no answer: where the least of the windows' scores for none is above those
            of all answers.
    """
    best = [(-math.inf, "", 0.0)] * len(questions)
    absent = [(math.inf, 0.0)] * len(questions)
    order = np.argsort(found.sequences.lengths, kind="stable")
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        tokens, targets = (part.to(device_of(task)) for part in found.sequences.batch(places))
        contexts = targets[:, 2:]
        first, last = task(tokens, contexts)
        scores, spans, nones = best_spans(first, last, contexts, task.longest)
        total = first.logsumexp(1) + last.logsumexp(1)
        spans = (spans - contexts[:, :1]).tolist()  # among the tokens of the window's part of the text
        numbers = torch.stack([scores, (scores - total).exp(), nones, (nones - total).exp()], 1).tolist()
        for place, (begin, end), (score, probability, *nothing) in zip(places, spans, numbers, strict=True):
            index, characters = found.question[place], found.spans[place]
            if score > best[index][0]:
                text = questions[index].context[characters[begin, 0] : characters[end, 1]]
                best[index] = score, text.strip(), probability
            absent[index] = min(absent[index], tuple(nothing))
    return [
        ("", nothing[1]) if none and nothing[0] > answer[0] else answer[1:]
        for answer, nothing in zip(best, absent, strict=True)
    ]


def report_answers(
    task: QuestionAnswering,
    questions: Sequence[Question],
    found: Windows,
    none: bool,
    report: Callable[[str], None],
) -> None:
    """Answers the questions set aside, and says how well, as SQuAD's script does.

    Args:
        task: a trained one; it is left in eval mode.
        questions: those set aside.
        found: their windows.
        none: see answers.
        report: takes lines for the reader.
    """
    given = [answer for answer, _ in answers(task.eval(), questions, found, none)]
    measured = scores(given, [item.answers for item in questions])
    groups = {"": measured}
    if none and any(not item.answers for item in questions):
        has = [bool(item.answers) for item in questions]
        groups |= {
            f" {name} an answer": [pair for pair, one in zip(measured, has, strict=True) if one is with_one]
            for name, with_one in (("with", True), ("without", False))
        }
    for name, pairs in groups.items():
        if pairs:
            exact, f1 = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            report(f"answers    exact match {exact:.2%}, F1 {f1:.2%} of {len(pairs):,} questions{name}")


def answer(
    task: QuestionAnswering, tokenizer: Tokenizer, head: dict, question: str, text: str
) -> tuple[str, float]:
    """Returns the part of a text that answers a question, "" for none, and its probability.

    Args:
        task: in eval mode.
        tokenizer: its.
        head: length, stride and none, as its checkpoint keeps them.
        question, text: as they are.

    Raises:
        ValueError: one of both is empty, or the question is too long.
    """
    for name, given in (("question", question), ("text", text)):
        if not given.strip():
            raise ValueError(f"{name} must not be empty, got nothing")
    asked = [Question("asked", without_surrogates(question), without_surrogates(text))]
    found = windows(asked, tokenizer, length=head["length"], stride=head["stride"])
    return answers(task, asked, found, head["none"])[0]
