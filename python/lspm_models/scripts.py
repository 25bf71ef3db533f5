"""What pretrain.py and finetune.py share: options, the run folder, and what they say at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lspm_models.checkpoint import refuse_mismatch
from lspm_models.data.text import TextConfig, TextData, prepare_text
from lspm_models.data.tokenizers import Tokenizer
from lspm_models.data.tokens import Tokens
from lspm_models.distributed import Processes
from lspm_models.files import remove
from lspm_models.fit_config import FREE, FitConfig
from lspm_models.models.gpt import GPT
from lspm_models.options import Parser, errors_in_one_line, fail, given, merge, read_config
from lspm_models.progress import counted, duration, quantity
from lspm_models.run_folder import ModelConfig, create_run, read_run
from lspm_models.tasks.language_modelling import LanguageModelling
from lspm_models.train import fit

SECTIONS = {"model": ModelConfig, "data": TextConfig, "training": FitConfig}


@dataclass(frozen=True)
class Run:
    """A run folder, the configs in force, and where its weights came from."""

    folder: Path
    model: ModelConfig
    data: TextConfig
    training: FitConfig
    init: str | None
    resume: bool
    processes: Processes
    report: Callable[[str], None]

    def text(self) -> tuple[Tokenizer, Tokens]:
        """Makes or opens the tokenizer and the tokens, the first process before the others."""
        with self.processes.first_before_others():
            return prepare_text(self.data, self.folder, self.report)

    def task(self, vocabulary_size: int) -> LanguageModelling:
        """Makes the model with random weights out of the run's seed."""
        torch.manual_seed(self.training.seed)
        return LanguageModelling(GPT(self.model.with_vocabulary(vocabulary_size)))

    def blocks(self, tokens: Tokens) -> TextData:
        """Makes the source of batches."""
        return TextData(
            tokens,
            self.model.context,
            self.training.batch_size,
            validation_batches=self.training.evaluation_batches,
            seed=self.training.seed,
            process=self.processes.rank,
            processes=self.processes.count,
        )


def training_parser(description: str, examples: Sequence[str]) -> Parser:
    """Returns a parser with the options every training script has."""
    parser = Parser(description, examples)
    parser.run.add_argument("--out", metavar="FOLDER", help="new folder for the run [runs/DATE-TIME]")
    parser.run.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    parser.run.add_argument("--config", metavar="FILE", help="TOML or JSON with options; flags override it")
    return parser


@contextmanager
def opened_run(
    arguments: argparse.Namespace,
    report: Callable[[str], None],
    *,
    init: str | None = None,
    defaults: dict | None = None,
) -> Iterator[Run]:
    """Makes the run folder, or opens the one to resume; takes a new one away if the body fails.

    Args:
        arguments: of training_parser with options out of SECTIONS.
        report: takes lines for the reader.
        init: checkpoint the weights come from.
        defaults: options by section, below config file and flags.

    Raises:
        ValueError: an option breaks its rule, or differs from that of the run to resume.
    """
    resume, processes = "resume" in arguments, Processes.join()
    if resume and "out" in arguments:
        raise ValueError(f"run: --out must be absent with --resume, got {arguments.out}")
    asked = [given(arguments, SECTIONS)]
    if "config" in arguments:
        file = read_config(arguments.config)
        file.pop("init", None)  # config.json of a run may serve as a config file
        asked.insert(0, file)
    if resume:
        folder = Path(arguments.resume)
        stored = read_run(folder)
        init = stored.pop("init", None)
        configs = _configs([stored, *asked])
        refuse_mismatch(_plain(_configs([stored])), _plain(configs), str(folder), FREE)
    else:
        folder = Path(getattr(arguments, "out", time.strftime("runs/%Y%m%d-%H%M%S")))
        folder = processes.gather(folder)[0]
        configs = _configs([defaults or {}, *asked])
        processes.device(configs["training"].device)
        with processes.first_before_others():
            if processes.first:
                create_run(folder, {"init": init, **_plain(configs)})
    silent = report if processes.first else lambda line: None
    try:
        yield Run(folder, *configs.values(), init, resume, processes, silent)
    except Exception:
        if not resume and processes.first:
            remove(folder)
        raise


def train(program: str, run: Run, task: LanguageModelling, data: TextData) -> int:
    """Trains and says where everything is.

    Returns:
        The exit code: 0, 1 where the loss was not finite, or 128 + signal.
    """
    config, device = run.training, run.processes.device(run.training.device)
    parameters, shape = sum(parameter.numel() for parameter in task.parameters()), task.config
    run.report(
        f"model      {quantity(parameters)} parameters: {counted(shape.layers, 'layer')}, "
        f"{shape.width} wide, {counted(shape.heads, 'head')}, {counted(shape.context, 'token')} of context"
    )
    run.report(f"training   on {device}, {config.precision}, into {run.folder}\n")
    began = time.monotonic()
    try:
        with errors_in_one_line(program):
            result = fit(
                task,
                data,
                config,
                run.folder,
                settings={
                    "init": run.init,
                    "model": dataclasses.asdict(task.config),
                    "data": _plain({"": run.data})[""],
                },
                resume=run.resume,
                report=run.report,
                processes=run.processes,
            )
    except FloatingPointError as error:
        fail(program, str(error), code=1)
    if result.interrupted:
        run.report(f"\ninterrupted at step {result.step}, which is saved; go on with")
        run.report(f"  python python/{program} --resume {run.folder}")
        return 128 + result.interrupted
    run.report(f"\ntrained    {result.step:,} steps; this session took {duration(time.monotonic() - began)}")
    run.report(f"loss       training {result.train_loss:.4f}, validation {result.validation_loss:.4f}")
    run.report(f"logs       {run.folder}/log.csv, loss.png, tensorboard/")
    run.report(f"checkpoint {result.checkpoint}")
    run.report(f"try it     python python/generate.py {run.folder}")
    return 0


def _configs(layers: Sequence[dict[str, dict]]) -> dict[str, ModelConfig | TextConfig | FitConfig]:
    return {name: SECTIONS[name](**options) for name, options in merge(SECTIONS, layers).items()}


def _plain(configs: dict) -> dict:
    """Returns configs as JSON gives them back."""
    return json.loads(json.dumps({name: dataclasses.asdict(config) for name, config in configs.items()}))
