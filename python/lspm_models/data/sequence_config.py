"""What fine-tuning on whole texts is told: which texts or questions, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lspm_models.data.labelled_texts import NAMED
from lspm_models.options import option
from lspm_models.tasks.sequence_classification import POOLINGS


@dataclass(frozen=True)
class ClassificationConfig:
    """Which texts have which labels, and how a text becomes one vector."""

    task: str = option(
        "classification", "classification, or question_answering, which has other options",
        choices=("classification",),
    )  # fmt: skip
    data: str | None = option(
        None,
        f"a .tsv, .csv or .jsonl file with a text and its label in each line; or {', '.join(NAMED)}",
        default="none",
        metavar="FILE",
    )
    held_out: str | None = option(
        None, "such a file to validate on", default="a part of the data", metavar="FILE"
    )
    text: str = option("text", "column of texts: its name in the first line, or its number if that has none")
    label: str = option("label", "column of labels")
    validation: float = option(0.1, "share of each label's texts set aside, where nothing is held out")
    length: int | None = option(
        None, "tokens of a text at most, its ends included; the rest is cut off", default="the context"
    )
    pooling: str = option(
        "auto",
        "features of the last token, of all, their mean, or of the first; auto: first of a BERT, else last",
        choices=("auto", *POOLINGS),
    )
    head_dropout: float = option(0.1, "probability of dropping a pooled feature in training")
    label_smoothing: float = option(0.0, "probability given to all labels alike")
    language_modelling: float = option(0.0, "weight of the loss of next tokens beside that of labels")

    def __post_init__(self) -> None:
        check_data(self, "a .tsv, .csv or .jsonl file of texts with labels")
        for name in ("head_dropout", "label_smoothing"):
            check_share(self, name)
        if not 0 <= self.language_modelling < math.inf:
            raise ValueError(f"data: language_modelling must be 0 or greater, got {self.language_modelling}")
        if self.pooling not in ("auto", *POOLINGS):
            known = ", ".join(("auto", *POOLINGS))
            raise ValueError(f"data: pooling must be one of {known}, got {self.pooling!r}")


@dataclass(frozen=True)
class QuestionsConfig:
    """Which questions about which texts, and what an answer may be."""

    task: str = option(
        "question_answering", "question_answering, or classification, which has other options",
        choices=("question_answering",),
    )  # fmt: skip
    data: str | None = option(None, "a JSON file in SQuAD's format", default="none", metavar="FILE")
    held_out: str | None = option(
        None, "such a file to validate on", default="a part of the data", metavar="FILE"
    )
    validation: float = option(0.1, "share of the texts set aside, where nothing is held out")
    length: int | None = option(
        None, "tokens of a question with a part of its text, at most", default="the context"
    )
    stride: int = option(128, "tokens from one part of a long text to the next")
    longest: int = option(30, "tokens of an answer at most")

    def __post_init__(self) -> None:
        check_data(self, "a JSON file in SQuAD's format")
        for name in ("stride", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"data: {name} must be at least 1, got {getattr(self, name)}")


def check_data(config: ClassificationConfig | QuestionsConfig, what: str) -> None:
    """Raises ValueError unless the fields that both have are in order."""
    if not config.data:
        raise ValueError(f"data: data must be {what}, got none")
    if config.length is not None and config.length < 1:
        raise ValueError(f"data: length must be at least 1, got {config.length}")
    check_share(config, "validation")


def check_share(config: object, name: str) -> None:
    """Raises ValueError unless a field is at least 0 and less than 1."""
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"data: {name} must be at least 0 and less than 1, got {getattr(config, name)}")
