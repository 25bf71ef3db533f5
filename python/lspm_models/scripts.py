"""What pretrain.py and finetune.py share: options, the run folder, and what they say at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lspm_models.checkpoint import refuse_mismatch
from lspm_models.distributed import Processes
from lspm_models.files import remove
from lspm_models.fit_config import FREE, FitConfig
from lspm_models.options import Parser, errors_in_one_line, fail, given, merge, read_config
from lspm_models.progress import counted, duration, quantity
from lspm_models.run_folder import create_run, read_run
from lspm_models.train import fit


@dataclass(frozen=True)
class Run:
    """A run folder, the configs in force, and where its weights came from; tuning: which of them learn."""

    folder: Path
    model: Any
    data: Any
    training: FitConfig
    init: str | None
    resume: bool
    processes: Processes
    report: Callable[[str], None]
    tuning: Any = None

    @property
    def quoted(self) -> str:
        """The folder, as a shell takes it."""
        return shlex.quote(str(self.folder))


class Job(Protocol):
    """What the scripts need to know of one kind of data and model.

    Attributes:
        sections: the config classes of model, data and training.
        defaults: options by section that differ from those of the classes.
        pretraining: description and examples of pretrain.py.
        fine_tuning: description and examples of finetune.py.
        init_help: what its --init takes.
    """

    sections: dict[str, type]
    defaults: dict[str, dict]
    pretraining: tuple[str, Sequence[str]]
    fine_tuning: tuple[str, Sequence[str]]
    init_help: str

    def add_options(self, parser: Parser, *, fine_tuning: bool = False) -> None:
        """Adds the options of every section that the script has."""

    def prepare(self, run: Run) -> tuple[nn.Module, Any]:
        """Makes the task, with random weights out of the run's seed, and the source of batches."""

    def find(self, init: str) -> Path:
        """Returns the weights to begin fine-tuning with."""

    def fine_tuning_defaults(self, init: Path) -> dict[str, dict]:
        """Returns options that fine-tuning from these weights has, below config file and flags."""

    def adopt(self, run: Run, init: Path) -> None:
        """Takes over what belongs to the weights; refuses options that do not fit them."""

    def load(self, run: Run, init: Path, task: nn.Module) -> None:
        """Copies the weights into the task."""

    def settings(self, run: Run, task: nn.Module) -> dict:
        """Returns what a checkpoint must agree on of the model."""

    def shape(self, task: nn.Module) -> str:
        """Returns the shape of the model as people say it."""

    def finish(self, run: Run, task: nn.Module, data: Any) -> None:
        """Reports what the trained model is good for."""


def training_parser(description: str, examples: Sequence[str], command: str = "") -> Parser:
    """Returns a parser with the options every training script has."""
    parser = Parser(description, examples, command)
    parser.run.add_argument("--out", metavar="FOLDER", help="new folder for the run [runs/DATE-TIME]")
    parser.run.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    parser.run.add_argument("--config", metavar="FILE", help="TOML or JSON with options; flags override it")
    return parser


@contextmanager
def opened_run(
    arguments: argparse.Namespace,
    report: Callable[[str], None],
    job: Job,
    *,
    fine_tuning: bool = False,
    init: str | None = None,
    defaults: dict | None = None,
) -> Iterator[Run]:
    """Makes the run folder, or opens the one to resume; takes away what it made if the body fails.

    Args:
        arguments: of training_parser with the job's options.
        report: takes lines for the reader.
        job: has the config classes.
        fine_tuning: whether the run is one of finetune.py, which alone has an init.
        init: checkpoint the weights come from.
        defaults: options by section, below config file and flags.

    Raises:
        ValueError: an option breaks its rule, or differs from that of the run to resume; that is a run of
            another script.
    """
    resume, processes = "resume" in arguments, Processes.join()
    if resume and "out" in arguments:
        raise ValueError(f"run: --out must be absent with --resume, got {arguments.out}")
    asked = [given(arguments, job.sections)]
    if "config" in arguments:
        file = read_config(arguments.config)
        file.pop("init", None)  # config.json of a run may serve as a config file
        asked.insert(0, file)
    if resume:
        folder = Path(arguments.resume)
        stored = read_run(folder)
        init = stored.pop("init", None)
        if (init is not None) != fine_tuning:
            rule = "be" if fine_tuning else "not be"
            raise ValueError(f"run: {folder} must {rule} a run of finetune.py, got init {init!r}")
        configs = _configs(job.sections, [stored, *asked])
        refuse_mismatch(_plain(_configs(job.sections, [stored])), _plain(configs), str(folder), FREE)
    else:
        folder = Path(getattr(arguments, "out", time.strftime("runs/%Y%m%d-%H%M%S")))
        folder = processes.gather(folder)[0]
        existed = folder.exists()
        configs = _configs(job.sections, [job.defaults, defaults or {}, *asked])
        processes.device(configs["training"].device)
        with processes.first_before_others():
            if processes.first:
                chosen = {name: config for name, config in configs.items() if config}  # not an empty tuning
                create_run(folder, {"init": init, **_plain(chosen)})
    silent = report if processes.first else lambda line: None
    try:
        yield Run(folder, **configs, init=init, resume=resume, processes=processes, report=silent)
    except Exception:
        if not resume and processes.first:
            for path in list(folder.iterdir()) if existed else [folder]:
                remove(path)
        raise


def train(program: str, run: Run, job: Job, task: nn.Module, data: Any) -> int:
    """Trains and says where everything is.

    Returns:
        The exit code: 0, 1 where the loss was not finite, or 128 + signal.
    """
    config, device = run.training, run.processes.device(run.training.device)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in task.parameters()]
    parameters, trained = (sum(size for size, trains in sizes if trains or every) for every in (True, False))
    some = f", {quantity(trained)} of which train" if trained < parameters else ""
    run.report(f"model      {quantity(parameters)} parameters{some}: {job.shape(task)}")
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
                    "model": job.settings(run, task),
                    "data": _plain({"": run.data})[""],
                    **({"tuning": _plain({"": run.tuning})[""]} if run.tuning else {}),
                },
                resume=run.resume,
                report=run.report,
                processes=run.processes,
            )
    except FloatingPointError as error:
        fail(program, str(error), code=1)
    if result.interrupted:
        run.report(f"\ninterrupted at step {result.step}, which is saved; go on with")
        run.report(f"  python python/{program} --resume {run.quoted}")
        return 128 + result.interrupted
    took = duration(time.monotonic() - began)
    run.report(f"\ntrained    {counted(result.step, 'step')}; this session took {took}")
    run.report(f"loss       training {result.train_loss:.4f}, validation {result.validation_loss:.4f}")
    run.report(f"logs       {run.folder}/log.csv, loss.png, tensorboard/")
    run.report(f"checkpoint {result.checkpoint}")
    with errors_in_one_line(program):
        job.finish(run, task, data)
    return 0


def _configs(sections: dict[str, type], layers: Sequence[dict[str, dict]]) -> dict[str, Any]:
    return {name: sections[name](**options) for name, options in merge(sections, layers).items()}


def _plain(configs: dict) -> dict:
    """Returns configs as JSON gives them back."""
    return json.loads(json.dumps({name: dataclasses.asdict(config) for name, config in configs.items()}))
