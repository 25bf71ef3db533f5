"""The one training loop: fit() trains any task on any source of batches, and goes on where it was stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lspm_kernels import AdamW
from lspm_models import checkpoint
from lspm_models.distributed import Processes
from lspm_models.fit_config import FREE, PRECISIONS, FitConfig, learning_rate
from lspm_models.interruption import Interruption
from lspm_models.progress import Progress, quantity
from lspm_models.run_log import RunLog
from lspm_models.training_state import as_written, checked


@dataclass(frozen=True)
class FitResult:
    """Where a run ended: `train_loss` is the mean since the evaluation before; NaN stands for no loss."""

    step: int
    train_loss: float
    validation_loss: float
    checkpoint: Path
    interrupted: int | None = None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the trainable parameters: those of two or more dimensions decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {
            "params": [parameter for parameter in trained if parameter.dim() >= 2],
            "weight_decay": weight_decay,
        },
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def fit(
    task: nn.Module,
    data: Any,
    config: FitConfig,
    folder: str | Path,
    *,
    settings: dict | None = None,
    resume: bool = False,
    report: Callable[[str], None] | None = None,
    processes: Processes | None = None,
) -> FitResult:
    """Trains a task, writing checkpoints, log.csv, TensorBoard events and loss.png into a folder.

    On a CPU a resumed run repeats the losses of an uninterrupted one bit for bit, with the same number of
    threads and a limit in steps. A limit in minutes makes the learning rate depend on the clock.

    Args:
        task: has `loss(inputs, targets)`, the mean loss of a batch. It may have `unit`, the name of what a
            batch counts if that is not its tokens, and `evaluate(inputs, targets)`, which gives the mean loss
            and a tensor; `metrics(sums)` makes of that tensor's sums over all batches the `metric_names`.
        data: has `training` (with next_batch(), state(), restore()), `validation()`, which yields the same
            batches every time, and `fingerprint`.
        config: how to train.
        folder: the run folder.
        settings: what else a checkpoint must agree on, as JSON can hold it, such as the model's config.
        resume: continue from the newest checkpoint in the folder; begin where there is none.
        report: takes lines for the reader; None is silent.
        processes: the group this process trains in.

    Returns:
        The losses at the end; `interrupted` is the signal (Ctrl-C or SIGTERM) that ended the run early.

    Raises:
        ValueError: the checkpoint does not fit the settings, the data or the model.
        FloatingPointError: the loss or the gradient is not finite; the message names the step.
    """
    state = _Fit(
        task, data, config, Path(folder), settings=settings or {}, processes=processes or Processes()
    )
    return state.run(resume, report)


class _Fit:
    """The state of one training run."""

    def __init__(
        self, task, data, config: FitConfig, folder: Path, *, settings: dict, processes: Processes
    ) -> None:
        self.config, self.data, self.folder, self.processes = config, data, folder, processes
        self.device = processes.device(config.device)
        self.task = task.to(self.device).train()
        self.unit, self.metrics = getattr(task, "unit", "token"), getattr(task, "metric_names", ())
        self.loss = processes.wrap(_Loss(self.task), self.device)
        self.settings = {
            **settings,
            "training": asdict(config),
            "data_fingerprint": data.fingerprint,
            "processes": processes.count,
        }
        self.optimizer = AdamW(
            parameter_groups(self.task, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            clip_norm=config.clip or None,
        )
        self.step, self.tokens, self.seconds_before = 0, 0, 0.0
        self.train_loss = self.validation_loss = math.nan
        self.recent = (0.0, 0)  # sum and number of the losses since the evaluation before
        self.saved: Path | None = None

    def run(self, resume: bool, report: Callable[[str], None] | None) -> FitResult:
        report = report if self.processes.first else None
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        if found and not resume:
            raise ValueError(f"fit: folder must hold no checkpoint unless resume is true, got {found[-1]}")
        if found:
            self.load(found[-1])
        elif self.processes.rank:
            torch.manual_seed(self.config.seed + self.processes.rank)  # each process drops other values
        self.began = time.monotonic()
        names = {"unit": self.unit, "metrics": self.metrics}
        self.log = RunLog(self.folder, self.step, **names) if self.processes.first else None
        self.progress = Progress(report, self.done(), self.unit)
        try:
            with Interruption() as interruption:
                received = self.steps(interruption)
        finally:
            self.progress.close()
            if self.log is not None:
                self.log.close()
        return FitResult(self.step, self.train_loss, self.validation_loss, self.saved, received)

    def steps(self, interruption: Interruption) -> int | None:
        """Steps until the end or a signal, and returns the signal."""
        config = self.config
        if self.step == 0:
            self.write_log(**self.evaluate())
        done, received = self.done(), None
        while done < 1 and not received:
            began = time.monotonic()
            rate = learning_rate(self.done(ahead=1), config)
            loss, norm, count, received = self.update(rate, interruption)
            self.step, self.tokens = self.step + 1, self.tokens + count
            done = self.done()
            values = {"train_loss": loss, "learning_rate": rate, "gradient_norm": norm}
            speed = count / (time.monotonic() - began)
            self.recent = (self.recent[0] + loss, self.recent[1] + 1)
            self.train_loss = self.recent[0] / self.recent[1]
            if due := done >= 1 or self.step % config.evaluate_every == 0:
                measured = self.evaluate()
                values |= measured
                metrics = "".join(f"   {name} {measured[name]:.4f}" for name in self.metrics if measured)
                self.progress.line(
                    f"step {self.step:>6}   training {self.train_loss:.4f}   validation "
                    f"{self.validation_loss:.4f}{metrics}   learning rate {rate:.2e}   "
                    f"{quantity(speed)} {self.unit}s/s"
                )
                self.recent = (0.0, 0)
            if due or self.step % config.log_every == 0:
                self.write_log(**values, **{f"{self.unit}s_per_second": speed})
            if done >= 1 or received or self.step % config.checkpoint_every == 0:
                self.save()
            self.progress.update(done, self.step, loss, speed)
        return received

    def update(self, rate: float, interruption: Interruption) -> tuple[float, float, int, int | None]:
        """Does one optimizer step; returns loss, gradient norm, tokens, and a signal if one came."""
        config, total, count = self.config, torch.zeros((), device=self.device), 0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for index in range(config.accumulation):
            inputs, targets = self.batch(self.data.training.next_batch())
            waits = index < config.accumulation - 1 and self.processes.count > 1
            with self.loss.no_sync() if waits else nullcontext():
                with self.autocast():
                    loss = self.loss(inputs, targets) / config.accumulation
                loss.backward()
            total, count = total + loss.detach(), count + self.size(targets)
        norm = self.optimizer.measure_grad_norm()
        loss, count, signals = self.processes.sum(
            [float(total), count, interruption.received or 0], self.device
        )
        loss = loss / self.processes.count
        self.require_finite("loss", loss, self.step + 1)
        self.require_finite("gradient norm", float(norm), self.step + 1)
        self.optimizer.step(grad_norm=norm)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, float(norm), int(count), (interruption.received or signal.SIGINT) if signals else None

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Returns mean loss and metrics over the validation batches, or nothing where there are none."""
        self.task.eval()
        total, count, sums = 0.0, 0, None
        for index, batch in enumerate(self.data.validation()):
            if index % self.processes.count == self.processes.rank:
                inputs, targets = self.batch(batch)
                with self.autocast():
                    if self.metrics:
                        loss, measured = self.task.evaluate(inputs, targets)
                        measured = measured.double().cpu()
                        sums = measured if sums is None else sums + measured
                    else:
                        loss = self.task.loss(inputs, targets)
                total += float(loss) * self.size(targets)
                count += self.size(targets)
        self.task.train()
        total, count = self.processes.sum([total, count], self.device)
        if not count:
            return {}
        self.validation_loss = total / count
        self.require_finite("validation loss", self.validation_loss, self.step)
        found = {"validation_loss": self.validation_loss}
        if self.metrics:  # a process beyond the last batch has no sums
            parts = [part for part in self.processes.gather(sums) if part is not None]
            found |= self.task.metrics(sum(parts).tolist())
        return found

    def done(self, ahead: int = 0) -> float:
        """Returns the share of the run that is done `ahead` steps from now, by the first process's clock."""
        by_step = (self.step + ahead) / self.config.steps if self.config.steps else 0.0
        if self.config.minutes is None:
            return by_step
        by_clock = self.processes.from_first(self.seconds() / (60 * self.config.minutes), self.device)
        return max(by_step, by_clock)

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype != torch.float32)

    def batch(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs.to(self.device), targets.to(self.device)

    def require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            kept = f"the newest checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
            raise FloatingPointError(f"fit: {what} must be finite, got {value} at step {step}; {kept}")

    def size(self, targets: Tensor) -> int:
        """Returns how many tokens, images or the like a batch has."""
        return targets.numel() if self.unit == "token" else len(targets)

    def write_log(self, **values: float) -> None:
        if self.log is not None:
            seconds = round(self.seconds(), 3)
            self.log.write(step=self.step, seconds=seconds, **{f"{self.unit}s": self.tokens}, **values)

    def save(self) -> None:
        state = {
            "settings": self.settings,
            "tokens": self.tokens,
            "seconds": self.seconds(),
            "train_loss": self.train_loss,
            "recent": self.recent,
            "validation_loss": self.validation_loss,
            "data": self.data.training.state(),
            "random": self.processes.gather(checkpoint.random_state(self.device)),
        }
        folder, keep = self.folder / "checkpoints", self.config.keep_checkpoints
        if self.processes.first:
            self.saved = checkpoint.save_checkpoint(
                folder, self.step, self.task, self.optimizer, state=state, keep=keep
            )
            self.log.plot()

    def load(self, path: Path) -> None:
        with as_written(path):
            settings = checkpoint.read_state(path)["settings"]
            checkpoint.refuse_mismatch(settings, self.settings, str(path), FREE)
            state = checked(checkpoint.load_training(path, self.task, self.optimizer), path)
            self.step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
            self.train_loss, self.validation_loss = state["train_loss"], state["validation_loss"]
            self.recent = state.get("recent", self.recent)  # which older checkpoints have not
            self.data.training.restore(state["data"])
            checkpoint.restore_random_state(state["random"][self.processes.rank], self.device)
        self.saved = path


class _Loss(nn.Module):
    """A task's loss as a forward call, the only call that gradient averaging sees."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(inputs, targets)
