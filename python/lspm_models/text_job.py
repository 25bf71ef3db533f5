"""Text for the training scripts: a GPT that learns the next token."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from lspm_models.adapter_folder import save_adapter
from lspm_models.checkpoint import refuse_mismatch
from lspm_models.data.text import TextConfig, TextData, prepare_text
from lspm_models.data.tokenizers import save_tokenizer
from lspm_models.fit_config import FitConfig
from lspm_models.language_models import GPTOptions, LlamaOptions, make_task, name_of, to_settings
from lspm_models.models.lora import lora_layers
from lspm_models.options import Parser
from lspm_models.progress import counted
from lspm_models.scripts import Run
from lspm_models.sources import open_source
from lspm_models.tasks.language_modelling import LanguageModelling
from lspm_models.tuning import Tuning

PRETRAINING = """\
Pretrain a GPT on text. Without any option it learns from the source text of Python's standard library.
The run folder gets the tokenizer, checkpoints, log.csv, loss.png and TensorBoard events; Ctrl-C saves first.
In brackets stands what holds without the option. A Llama: --model llama --help; a BERT: --model bert --help;
images: --model resnet18 (or unet, or detector) --help."""

FINE_TUNING = """\
Fine-tune a GPT or a Llama on another text: the same loop as pretrain.py, beginning with the weights and the
tokenizer of a run, of a Hugging Face folder or of a GGUF file. In brackets stands what holds without the
option. Classes of texts: --task classification --help; answers to questions: --task question_answering
--help; images: --model resnet18 (or unet, or detector) --help."""

TOKENIZER = ("tokenizer", "vocabulary_size", "tokenizer_sample")
FINE_TUNING_RATE = {"learning_rate": 1e-4}


class TextJob:
    """See Job."""

    sections = {"model": GPTOptions, "data": TextConfig, "training": FitConfig}  # noqa: RUF012
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
            "finetune.py --init runs/demo --corpus shakespeare --lora-rank 8 --out runs/bard",
            "finetune.py --init runs/demo --corpus shakespeare --freeze 'model.layers.[01]' '*norm*'",
            "finetune.py --resume runs/bard",
            "finetune.py --init runs/fashion --data photos/ --freeze 3",
        ),
    )

    init_help = "to begin with: run folder, one checkpoint in it, Hugging Face's folder, or GGUF file"
    free = ("dropout",)  # of the model, in fine-tuning

    def add_options(self, parser: Parser, *, fine_tuning: bool = False) -> None:
        parser.add_config("text", self.sections["data"], skip=TOKENIZER if fine_tuning else ())
        options = self.sections["model"]
        skip = [item.name for item in fields(options) if item.name not in self.free] if fine_tuning else ()
        parser.add_config("model", options, skip=skip)
        parser.add_config("training", FitConfig, FINE_TUNING_RATE if fine_tuning else None)
        if fine_tuning:
            self.sections = {**self.sections, "tuning": Tuning}
            parser.add_config("what learns", Tuning)

    def prepare(self, run: Run) -> tuple[LanguageModelling, TextData]:
        with run.processes.first_before_others():
            tokenizer, tokens = prepare_text(run.data, run.folder, run.report)
        torch.manual_seed(run.training.seed)
        task = make_task(run.model.with_vocabulary(tokenizer.vocabulary_size))
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

    def open(self, init: str | Path) -> Any:
        """Opens what fine-tuning begins with: it has where, config, tokenizer() and task()."""
        return open_source(init)

    def find(self, init: str) -> Path:
        return Path(self.open(init).where).resolve()

    def fine_tuning_defaults(self, init: Path) -> dict[str, dict]:
        return {"model": self._shape(init), "training": FINE_TUNING_RATE}

    def adopt(self, run: Run, init: Path) -> None:
        free = {f"model.{name}" for name in self.free}
        refuse_mismatch({"model": self._shape(init)}, {"model": asdict(run.model)}, str(init), free)
        save_tokenizer(self.open(init).tokenizer(), run.folder / "tokenizer.json")

    def _shape(self, init: Path) -> dict:
        config = self.open(init).config
        shape = {"model": name_of(config), **asdict(config)}
        shape.pop("vocabulary_size")  # the tokenizer's
        return shape

    def load(self, run: Run, init: Path, task: LanguageModelling) -> None:
        self.open(init).load(task)

    def settings(self, run: Run, task: LanguageModelling) -> dict:
        return to_settings(task.config)

    def shape(self, task: LanguageModelling) -> str:
        shape = task.config
        return (
            f"{counted(shape.layers, 'layer')}, {shape.width} wide, {counted(shape.heads, 'head')}, "
            f"{counted(shape.context, 'token')} of context"
        )

    def finish(self, run: Run, task: LanguageModelling, data: TextData) -> None:
        if lora_layers(task) and run.processes.first:
            save_adapter(task, run.folder / "adapter", run.init)
            run.report(f"adapter    {run.folder}/adapter, as peft reads it")
        run.report(f"try it     python python/generate.py {run.quoted}")


class LlamaJob(TextJob):
    """See Job."""

    sections = {**TextJob.sections, "model": LlamaOptions}  # noqa: RUF012
    free = ("context",)  # rotations have no table that ends
