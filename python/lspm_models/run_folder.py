"""The run folder: what was asked, the tokenizer, checkpoints and logs; and the way back to a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lspm_models import checkpoint
from lspm_models.data.tokenizers import Tokenizer, load_tokenizer
from lspm_models.files import write_atomically
from lspm_models.models.gpt import GPT, GPTConfig
from lspm_models.tasks.language_modelling import LanguageModelling


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT but for the vocabulary, which the tokenizer brings."""

    context: int = field(default=256, metadata={"help": "tokens seen at once, and per training sequence"})
    layers: int = field(default=4, metadata={"help": "blocks"})
    heads: int = field(default=4, metadata={"help": "attention heads per block"})
    width: int = field(default=256, metadata={"help": "features per token, a multiple of heads"})
    dropout: float = field(default=0.0, metadata={"help": "probability of dropping a feature in training"})
    bias: bool = field(default=True, metadata={"help": "biases in linear layers and norms"})
    eps: float = field(default=1e-5, metadata={"help": "added to the variance in norms"})

    def __post_init__(self) -> None:
        self.with_vocabulary(1)  # the shape checks its own rules

    def with_vocabulary(self, size: int) -> GPTConfig:
        """Returns the whole shape; a ValueError names a field that breaks its rule."""
        return GPTConfig(vocabulary_size=size, **asdict(self))


def create_run(folder: Path, settings: dict) -> None:
    """Makes a run folder and writes what was asked into its config.json.

    Raises:
        ValueError: the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"; continue that run with --resume {folder}" if (folder / "config.json").exists() else ""
        raise ValueError(f"run: {folder} must be a new or an empty folder, got one that is not empty{hint}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "config.json", json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
    )


def read_run(folder: Path) -> dict:
    """Returns what was asked of a run.

    Raises:
        ValueError: the folder holds no run.
    """
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"run: {folder} must be a run folder, got no config.json in it") from error


def find_checkpoint(folder: str | Path) -> Path:
    """Returns the newest checkpoint of a run folder, or the folder itself where it is a checkpoint.

    Raises:
        ValueError: there is no such folder, or no checkpoint in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint: {folder} must be a run folder or a checkpoint, got no such folder")
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


def read_model_config(path: Path) -> GPTConfig:
    """Returns the shape of the model in a checkpoint.

    Raises:
        ValueError: the checkpoint is not of a GPT.
    """
    content = checkpoint.read_state(path).get("settings", {}).get("model")
    try:
        return GPTConfig(**content)
    except TypeError as error:
        raise ValueError(f"checkpoint: {path} must hold the config of a GPT, got {content!r}") from error


def load_model_folder(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[LanguageModelling, Tokenizer]:
    """Loads a trained language model with its tokenizer.

    Args:
        folder: a run folder, whose newest checkpoint is taken, or one checkpoint in it.
        device: where the model shall be.

    Returns:
        The task, in eval mode, and the tokenizer.

    Raises:
        ValueError: there is no checkpoint, or its parts do not fit each other.
    """
    path = find_checkpoint(folder)
    config, tokenizer = read_model_config(path), load_tokenizer(tokenizer_path(path))
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise ValueError(
            f"checkpoint: vocabulary_size must be the tokenizer's, {tokenizer.vocabulary_size}, "
            f"got {config.vocabulary_size} in {path}"
        )
    task = LanguageModelling(GPT(config))
    checkpoint.load_weights(path, task)
    return task.to(device).eval(), tokenizer
