"""The run folder: what was asked, the tokenizer, checkpoints and logs; and the way back to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from lspm_models import checkpoint, language_models
from lspm_models.data.tokenizers import Tokenizer, load_tokenizer
from lspm_models.files import write_atomically
from lspm_models.json_files import read_object
from lspm_models.models import lora
from lspm_models.training_state import as_written
from lspm_models.tuning import Tuning


def create_run(folder: Path, settings: dict) -> None:
    """Makes a run folder and writes what was asked into its config.json.

    Raises:
        ValueError: the folder holds something already.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run: {folder} must be a new or an empty folder, got a file")
    if folder.exists() and any(folder.iterdir()):
        hint = f"; continue that run with --resume {folder}" if (folder / "config.json").exists() else ""
        raise ValueError(f"run: {folder} must be a new or an empty folder, got one that is not empty{hint}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "config.json", json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
    )


def read_run(folder: Path) -> dict:
    """Returns what was asked of a run.

    Raises:
        ValueError: the folder holds no run, or its config.json is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"run: {folder} must be a run folder, got no config.json in it")
    return read_object(path)


def find_checkpoint(folder: str | Path) -> Path:
    """Returns the newest checkpoint of a run folder, or the folder itself where it is a checkpoint.

    Raises:
        ValueError: there is no such folder, or no checkpoint in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise ValueError(f"checkpoint: {folder} must be a run folder or a checkpoint, got {got}")
    if (folder / "state.json").exists():
        return folder
    found = checkpoint.checkpoints(folder / "checkpoints")
    if not found:
        raise ValueError(
            f"checkpoint: {folder} must be a run folder or a checkpoint, got no checkpoint in it"
        )
    return found[-1]


def tokenizer_path(path: Path) -> Path:
    """Returns where the tokenizer of a checkpoint lies: in the run folder, two folders above."""
    return path.resolve().parents[1] / "tokenizer.json"


class RunCheckpoint:
    """A language model in a run folder, as Pretrained is one in the formats of others.

    Args:
        folder: a run folder, whose newest checkpoint is taken, or one checkpoint in it.

    Raises:
        ValueError: there is no checkpoint, or not of a language model.
    """

    def __init__(self, folder: str | Path):
        self.path = find_checkpoint(folder).resolve()
        self.where = str(self.path)
        settings = checkpoint.read_state(self.path).get("settings", {})
        with as_written(self.path):
            self._init, self._tuning = settings.get("init"), Tuning(**settings.get("tuning", {}))
        self._read(settings.get("model"))

    def _read(self, settings: Any) -> None:
        """Takes what a checkpoint keeps of a model."""
        self.config = language_models.from_settings(settings, self.where)

    def _make(self) -> nn.Module:
        """Makes the task, with random weights."""
        return language_models.make_task(self.config)

    def tokenizer(self) -> Tokenizer:
        """Returns the run's tokenizer; a ValueError where it is not the model's."""
        tokenizer = load_tokenizer(tokenizer_path(self.path))
        if tokenizer.vocabulary_size != self.config.vocabulary_size:
            raise ValueError(
                f"checkpoint: vocabulary_size must be the tokenizer's, {tokenizer.vocabulary_size}, "
                f"got {self.config.vocabulary_size} in {self.path}"
            )
        return tokenizer

    def task(self) -> language_models.Task:
        """Makes the task, in eval mode, with the weights."""
        task = self._make()
        self.load(task)
        return task.eval()

    def model(self) -> nn.Module:
        """Makes the model alone, from tokens to features, in eval mode, with the weights."""
        if self._tuning.adapts:
            return self.task().model
        stored = checkpoint.read_tensors(self.path / "model.safetensors")
        stored = {name: tensor for name, tensor in stored.items() if name.startswith("model.")}
        parts = nn.ModuleDict({"model": language_models.make_model(self.config)})
        checkpoint.copy_weights(stored, parts, self.path)
        return parts["model"].eval()

    def load(self, task: language_models.Task) -> None:
        """Copies the weights into a task: adapters are added to the weights that they learned beside."""
        if not self._tuning.adapts:
            checkpoint.load_weights(self.path, task)
            return
        from lspm_models.sources import open_source  # which opens runs, too

        if not Path(self._init).exists():
            rule = f"checkpoint: {self._init}, which the adapters in {self.path} belong to, must be there"
            raise ValueError(f"{rule}, got no such path")
        open_source(self._init).load(task)
        self._tuning.apply(task)
        checkpoint.load_weights(self.path, task)
        lora.merge(task)
        lora.remove_lora(task)
