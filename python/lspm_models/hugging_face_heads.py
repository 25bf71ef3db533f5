"""Checkpoints of Hugging Face's transformers with a head for whole texts or for answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lspm_models.hugging_face import HuggingFaceFolder
from lspm_models.hugging_face_config import ARCHITECTURES, head_name, head_prefix
from lspm_models.sequence_models import make_task
from lspm_models.tasks.question_answering import QuestionAnswering
from lspm_models.tasks.sequence_classification import SequenceClassification


class HeadFolder(HuggingFaceFolder):
    """A folder of a GPT-2, a Llama or a BERT with a head; see HuggingFaceFolder.

    Attributes:
        name: of the task, as HEADS has it.
        head: what HEADS names of the task; of question answering what is longest alone.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        kind = self._content["model_type"]
        stated = self._content.get("architectures")
        theirs = stated[0] if isinstance(stated, list) and stated else None
        tasks = {names[kind]: task for task, names in ARCHITECTURES.items()}
        if theirs not in tasks:
            known = ", ".join(tasks)
            raise ValueError(
                f"hugging_face: architectures in {self.folder} must be one of {known}, got {stated!r}"
            )
        self.name, self._kind = tasks[theirs], kind
        self._prefix = head_prefix(self.name, kind, self._format.prefix)
        if self.name == "classification":
            pooling = "first" if kind == "bert" else "last"
            self.head: dict[str, Any] = {"labels": self._labels(), "pooling": pooling}
        else:
            self.head = {"longest": 30}

    def named(self, name: str) -> str:
        return super().named(head_name(self._kind, name))

    def task(self) -> nn.Module:
        """Makes the task in float32, in eval mode, with the weights; see Pretrained.task."""
        return self._made(lambda: make_task(self.config, self.name, self.head))

    def _labels(self) -> list[str]:
        count, names = self._content.get("num_labels", 2), self._content.get("id2label")
        if names is None:
            return [f"LABEL_{index}" for index in range(count)]
        try:
            return [names[str(index)] for index in range(len(names))]
        except (KeyError, TypeError):
            raise ValueError(
                f"hugging_face: id2label in {self.folder} must have a label for each number, got {names!r}"
            ) from None


def load_head(folder: str | Path) -> tuple[SequenceClassification | QuestionAnswering, list[str]]:
    """Loads a classifier, or a model that answers questions, that transformers' save_pretrained wrote.

    Args:
        folder: with config.json, whose architectures name GPT2ForSequenceClassification, Llama's, Bert's, or
            one of theirs ForQuestionAnswering, and model.safetensors, or shards with an index.

    Returns:
        The task in float32, in eval mode, and the labels, of answers none.

    Raises:
        ValueError: as of load_pretrained.
    """
    source = HeadFolder(folder)
    return source.task(), source.head.get("labels", [])
