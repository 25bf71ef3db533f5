"""Text for the training scripts: a GPT that learns the next token."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from lspm_models.checkpoint import load_weights, refuse_mismatch
from lspm_models.data.text import TextConfig, TextData, prepare_text
from lspm_models.files import write_atomically
from lspm_models.fit_config import FitConfig
from lspm_models.models.gpt import GPT
from lspm_models.options import Parser
from lspm_models.progress import counted
from lspm_models.run_folder import ModelConfig, find_checkpoint, read_model_config, tokenizer_path
from lspm_models.scripts import Run
from lspm_models.tasks.language_modelling import LanguageModelling

PRETRAINING = """\
Pretrain a GPT on text. Without any option it learns from the source text of Python's standard library.
The run folder gets the tokenizer, checkpoints, log.csv, loss.png and TensorBoard events; Ctrl-C saves first.
In brackets stands what holds without the option. Images: --model resnet18 (or unet, or detector) --help."""

FINE_TUNING = """\
Fine-tune a GPT on another text: the same loop as pretrain.py, beginning with the weights and the tokenizer
of a checkpoint. In brackets stands what holds without the option.
Images: --model resnet18 (or unet, or detector) --help."""

TOKENIZER = ("tokenizer", "vocabulary_size", "tokenizer_sample")
FINE_TUNING_RATE = {"learning_rate": 1e-4}


class TextJob:
    """See Job."""

    sections = {"model": ModelConfig, "data": TextConfig, "training": FitConfig}  # noqa: RUF012
    defaults: dict[str, dict] = {}  # noqa: RUF012
    pretraining = (
        PRETRAINING,
        (
            "pretrain.py --minutes 3 --out runs/demo",
            "pretrain.py --corpus notes.txt letters/ --tokenizer character --layers 2 --width 128",
            "pretrain.py --config python/configs/gpt_tiny.toml --learning-rate 3e-4",
            "pretrain.py --resume runs/demo --minutes 6",
            "pretrain.py --config python/configs/resnet18_fashion.toml",
        ),
    )
    fine_tuning = (
        FINE_TUNING,
        (
            "finetune.py --init runs/demo --corpus shakespeare --steps 200 --out runs/bard",
            "finetune.py --resume runs/bard",
            "finetune.py --init runs/fashion --data photos/ --freeze 3",
        ),
    )

    init_help = "run folder, or one checkpoint in it, to begin with"

    def add_options(self, parser: Parser, *, fine_tuning: bool = False) -> None:
        parser.add_config("text", TextConfig, skip=TOKENIZER if fine_tuning else ())
        if not fine_tuning:
            parser.add_config("model", ModelConfig)
        parser.add_config("training", FitConfig, FINE_TUNING_RATE if fine_tuning else None)

    def prepare(self, run: Run) -> tuple[LanguageModelling, TextData]:
        with run.processes.first_before_others():
            tokenizer, tokens = prepare_text(run.data, run.folder, run.report)
        torch.manual_seed(run.training.seed)
        task = LanguageModelling(GPT(run.model.with_vocabulary(tokenizer.vocabulary_size)))
        data = TextData(
            tokens,
            run.model.context,
            run.training.batch_size,
            validation_batches=run.training.evaluation_batches,
            seed=run.training.seed,
            process=run.processes.rank,
            processes=run.processes.count,
        )
        return task, data

    def find(self, init: str) -> Path:
        return find_checkpoint(init).resolve()

    def fine_tuning_defaults(self, init: Path) -> dict[str, dict]:
        return {"model": self._shape(init), "training": FINE_TUNING_RATE}

    def adopt(self, run: Run, init: Path) -> None:
        refuse_mismatch(
            {"model": self._shape(init)}, {"model": asdict(run.model)}, str(init), {"model.dropout"}
        )
        write_atomically(run.folder / "tokenizer.json", tokenizer_path(init).read_bytes())

    def _shape(self, init: Path) -> dict:
        shape = asdict(read_model_config(init))
        shape.pop("vocabulary_size")  # the tokenizer's
        return shape

    def load(self, run: Run, init: Path, task: LanguageModelling) -> None:
        load_weights(init, task)

    def settings(self, run: Run, task: LanguageModelling) -> dict:
        return asdict(task.config)

    def shape(self, task: LanguageModelling) -> str:
        shape = task.config
        return (
            f"{counted(shape.layers, 'layer')}, {shape.width} wide, {counted(shape.heads, 'head')}, "
            f"{counted(shape.context, 'token')} of context"
        )

    def finish(self, run: Run, task: LanguageModelling, data: TextData) -> None:
        run.report(f"try it     python python/generate.py {run.folder}")
