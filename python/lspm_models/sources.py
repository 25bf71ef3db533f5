"""Where language models come from: a run of ours, a folder of Hugging Face's, a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch

from lspm_models.data.tokenizers import Tokenizer
from lspm_models.gguf_model import GgufModel
from lspm_models.hugging_face import HuggingFaceFolder
from lspm_models.json_files import read_object
from lspm_models.models.bert import BertConfig
from lspm_models.pretrained import Pretrained
from lspm_models.run_folder import RunCheckpoint
from lspm_models.tasks.language_modelling import LanguageModelling

# Names of what a model for generation keeps its weights in: dtype, and columns to a scale. With 64 an integer
# and its share of a scale take 8.5 bits, as in llama.cpp's Q8_0, which has half scales to 32.
WEIGHTS = {"float32": (torch.float32,), "bfloat16": (torch.bfloat16,), "int8": (torch.int8, 64)}


def open_source(path: str | Path) -> RunCheckpoint | Pretrained:
    """Opens a model; its weights and its tokenizer are read when they are asked for.

    Args:
        path: a run folder, one checkpoint in it, a folder of Hugging Face's with config.json and safetensors,
            or a GGUF file.

    Raises:
        ValueError: there is no model, or one that is not read; the message says what and where.
    """
    path = Path(path)
    if not is_foreign(path):
        if path.is_dir() and (files := sorted(path.glob("*.gguf"))):
            raise ValueError(f"gguf: {path} must be a GGUF file, got the folder of {files[0].name}")
        return RunCheckpoint(path)
    return HuggingFaceFolder(path) if path.is_dir() else GgufModel(path)


def is_foreign(path: Path) -> bool:
    """Whether a path is a model in the formats of others, or must be if it is one."""
    if not path.is_dir():
        return path.is_file() or path.suffix == ".gguf"
    config = path / "config.json"  # a run has one, too
    return config.exists() and not (path / "checkpoints").exists() and "model_type" in read_object(config)


def load_language_model(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[LanguageModelling, Tokenizer]:
    """Loads a language model with its tokenizer.

    Args:
        path: see open_source.
        device: where the model shall be.

    Returns:
        The task, in eval mode, and the tokenizer.

    Raises:
        ValueError: there is no model, it continues no texts, or its parts do not fit each other.
    """
    source = open_source(path)
    if isinstance(source.config, BertConfig):
        raise ValueError(f"generate: model must continue texts, got a BERT in {path}; see predict.py --text")
    tokenizer = source.tokenizer()
    return source.task().to(device), tokenizer
