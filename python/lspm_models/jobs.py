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
from lspm_models.sequence_job import TASKS
from lspm_models.sources import is_foreign, open_source
from lspm_models.text_job import LlamaJob, TextJob

NAMES = ("model", "model"), ("data", "task")  # sections and options in a config


def job_of(arguments: Sequence[str], *, fine_tuning: bool = False) -> Job:
    """Returns the job of the model and the task that options name, or else the files given.

    These are a config file, a run, or a checkpoint; a GPT needs no name. What is not there, and weights that
    are none, is told here, where no name is given: options of the job that it would ask for would be called
    unknown first. What else cannot be read is left to whoever needs it, and to its message.

    Args:
        arguments: of the script.
        fine_tuning: whether the script begins with trained weights, which tasks on whole texts need.

    Raises:
        ValueError: there is no model, or no task of it, of this name, or a file or folder is no such thing.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--task", "--model", "--config", "--resume", "--init"):
        parser.add_argument(option, nargs="?")
    given, _ = parser.parse_known_args(arguments)
    name, task = given.model, given.task
    opened = (given.config, read_config), (given.resume, read_run), (given.init, open_source)
    for source, read in opened:
        if source is not None:
            of_source = _asked_in(Path(source))
            told = of_source[0] is not None if read is open_source else Path(source).exists()
            if name is None and not told:
                read(Path(source))
            name, task = name or of_source[0], task or of_source[1]
    job = _job_of_model(name)
    if task is None:
        return job
    if task not in TASKS or not isinstance(job, TextJob):
        known = f"one of {', '.join(TASKS)}" if isinstance(job, TextJob) else f"absent with {name}"
        raise ValueError(f"task: name must be {known}, got {task!r}")
    if not fine_tuning:
        raise ValueError(f"task: {task} must begin with trained weights: finetune.py --init, got pretrain.py")
    return TASKS[task](job)


def _job_of_model(name: str | None) -> Job:
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


def _asked_in(path: Path) -> tuple[str | None, str | None]:
    """Returns the names of the model and of the task in a config file, a run or a checkpoint, or None."""
    if path.suffix == ".safetensors":  # bare weights are torchvision's
        return ImageJob.sections["model"]().model, None
    try:
        if (path.suffix == ".gguf" or path.is_dir()) and is_foreign(path):
            return name_of(open_source(path).config), None
        if path.is_file():
            content = read_config(path)
        else:
            run = path if (path / "config.json").exists() else find_checkpoint(path).resolve().parents[1]
            content = read_run(run)
        names = (content.get(section, {}).get(option) for section, option in NAMES)
        return tuple(name if name is None else str(name) for name in names)
    except (ValueError, AttributeError):
        return None, None
