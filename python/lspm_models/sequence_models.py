"""Models with a head for whole texts or for answers: what a checkpoint keeps of them, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lspm_models import checkpoint, language_models
from lspm_models.data.tokenizers import Tokenizer
from lspm_models.language_models import Config
from lspm_models.models.bert import BertConfig
from lspm_models.run_folder import RunCheckpoint, find_checkpoint
from lspm_models.sources import is_foreign
from lspm_models.tasks.question_answering import QuestionAnswering
from lspm_models.tasks.sequence_classification import SequenceClassification

# What a checkpoint keeps of a head, by task.
HEADS = {
    "classification": ("labels", "pooling"),
    "question_answering": ("longest", "length", "stride", "none"),
}


def make_task(config: Config, task: str, head: dict[str, Any], **options: Any) -> nn.Module:
    """Makes a model with a head, with random weights.

    Args:
        config: of the model.
        task: a key of HEADS.
        head: what HEADS names.
        options: of the head, for training.
    """
    if isinstance(config, BertConfig):
        config = replace(config, pooler=head.get("pooling") == "first")
    model = language_models.make_model(config)
    if task == "classification":
        return SequenceClassification(model, len(head["labels"]), pooling=head["pooling"], **options)
    return QuestionAnswering(model, head["longest"], **options)


def to_settings(config: Config, task: str, head: dict[str, Any]) -> dict:
    """Returns what a checkpoint keeps of a model with a head."""
    return {"task": task, **head, **language_models.to_settings(config)}


def task_of(path: Path) -> str | None:
    """Returns the name of a checkpoint's task where it has one of HEADS."""
    settings = checkpoint.read_state(path).get("settings", {}).get("model")
    task = settings.get("task") if isinstance(settings, dict) else None
    return task if task in HEADS else None


def task_in(folder: str | Path) -> str | None:
    """Returns the name of a run's task where it has one of HEADS; a ValueError if it has no checkpoint."""
    return None if is_foreign(Path(folder)) else task_of(find_checkpoint(folder))


class SequenceCheckpoint(RunCheckpoint):
    """A model with a head in a run folder.

    Args:
        folder: a run folder, whose newest checkpoint is taken, or one checkpoint in it.

    Raises:
        ValueError: there is no checkpoint, or not of such a model.
    """

    def _read(self, settings: Any) -> None:
        settings = dict(settings)
        self.name = settings.pop("task")
        try:
            self.head = {name: settings.pop(name) for name in HEADS[self.name]}
        except KeyError as error:
            raise ValueError(f"checkpoint: {self.where} must hold {error} of its head, got none") from None
        super()._read(settings)

    def _make(self) -> nn.Module:
        return make_task(self.config, self.name, self.head)


def load_sequence_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """Loads a classifier of texts or a model that answers questions.

    Args:
        folder: a run folder, whose newest checkpoint is taken, or one checkpoint in it.
        device: where the model shall be.

    Returns:
        The task, in eval mode, its tokenizer, and what HEADS names of it.

    Raises:
        ValueError: there is no checkpoint, or its parts do not fit each other.
    """
    source = SequenceCheckpoint(folder)
    tokenizer = source.tokenizer()
    return source.task().to(device), tokenizer, source.head
