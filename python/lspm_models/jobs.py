"""Which job a command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lspm_models.bert_job import BertJob
from lspm_models.image_job import MODELS, ImageJob
from lspm_models.language_models import name_of
from lspm_models.options import read_config
from lspm_models.run_folder import find_checkpoint, read_run
from lspm_models.scene_job import JOBS
from lspm_models.scripts import Job
from lspm_models.sources import is_foreign, open_source
from lspm_models.text_job import LlamaJob, TextJob


def job_of(arguments: Sequence[str]) -> Job:
    """Returns the job of the model that --model names, or else the config file, run or checkpoint given.

    A GPT needs no name. What cannot be read is left to whoever needs it, and to its message.

    Raises:
        ValueError: there is no model of this name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model", "--config", "--resume", "--init"):
        parser.add_argument(option, nargs="?")
    given, _ = parser.parse_known_args(arguments)
    name = given.model
    for source in (given.config, given.resume, given.init):
        if name is None and source is not None:
            name = _model_in(Path(source))
    if name in (None, "gpt"):
        return TextJob()
    if name == "llama":
        return LlamaJob()
    if name == "bert":
        return BertJob()
    if name in JOBS:
        return JOBS[name]
    if name not in MODELS:
        raise ValueError(
            f"model: name must be one of gpt, llama, bert, {', '.join((*MODELS, *JOBS))}, got {name!r}"
        )
    return ImageJob()


def _model_in(path: Path) -> str | None:
    """Returns the name of the model in a config file, a run or a checkpoint, or None."""
    if path.suffix == ".safetensors":  # bare weights are torchvision's
        return ImageJob.sections["model"]().model
    try:
        if (path.suffix == ".gguf" or path.is_dir()) and is_foreign(path):
            return name_of(open_source(path).config)
        if path.is_file():
            content = read_config(path)
        else:
            run = path if (path / "config.json").exists() else find_checkpoint(path).resolve().parents[1]
            content = read_run(run)
        return content["model"]["model"]
    except (ValueError, KeyError, TypeError):
        return None
