"""How to train: the options of fit() and the learning rate they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lspm_models.options import option

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Fields that may differ when a run goes on: they say how far, or do not change what a step computes.
FREE = {
    f"training.{name}"
    for name in ("steps", "minutes", "checkpoint_every", "keep_checkpoints", "log_every", "device")
}


@dataclass(frozen=True)
class FitConfig:
    """How to train. The run ends at `steps` or after `minutes`, whichever comes first."""

    steps: int | None = option(None, "optimizer steps", default="1000, or as many as fit into --minutes")
    minutes: float | None = option(None, "wall clock limit, evaluation included", default="none")
    batch_size: int = option(16, "sequences or images per batch and process")
    accumulation: int = option(1, "batches per optimizer step")
    learning_rate: float = option(1e-3, "learning rate after warm-up")
    final_learning_rate: float = option(0.1, "where the cosine ends, as a share of learning_rate")
    warmup: float = option(0.05, "share of the run in which the learning rate rises")
    weight_decay: float = option(0.1, "of matrices; biases and norms have none")
    beta1: float = option(0.9, "AdamW's decay of the mean gradient")
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient")
    clip: float = option(1.0, "largest gradient norm, 0 for no limit")
    precision: str = option("float32", "of matrix products; weights stay float32", choices=tuple(PRECISIONS))
    device: str = option("auto", "cpu, cuda, cuda:1; auto: a GPU where there is one")
    seed: int = option(0, "of weights, batches and dropout")
    evaluate_every: int = option(100, "steps between evaluations")
    evaluation_batches: int = option(16, "batches per evaluation")
    checkpoint_every: int = option(100, "steps between checkpoints")
    keep_checkpoints: int = option(2, "checkpoints to keep")
    log_every: int = option(1, "steps between rows of log.csv")

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", 1000)
        rules: list[tuple[str, str, Callable[[Any], bool]]] = [
            (
                "steps minutes batch_size accumulation learning_rate",
                "greater than 0",
                lambda value: value > 0,
            ),
            ("evaluate_every evaluation_batches checkpoint_every", "greater than 0", lambda value: value > 0),
            ("keep_checkpoints log_every", "greater than 0", lambda value: value > 0),
            ("weight_decay clip", "0 or greater", lambda value: value >= 0),
            ("seed", "0 or greater and below 2 ** 64", lambda value: 0 <= value < 2**64),
            ("final_learning_rate warmup", "between 0 and 1", lambda value: 0 <= value <= 1),
            ("beta1 beta2", "at least 0 and less than 1", lambda value: 0 <= value < 1),
        ]
        for names, rule, holds in rules:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (holds(value) and value < math.inf):
                    raise ValueError(f"training: {name} must be {rule}, got {value}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"training: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )


def learning_rate(done: float, config: FitConfig) -> float:
    """Returns the learning rate for a share of the run: a linear rise, then half a cosine.

    Args:
        done: 0 at the beginning, 1 at the end: the larger of step / steps and seconds / limit.
        config: learning_rate, warmup and final_learning_rate.

    Source: Loshchilov and Hutter, SGDR (2017), equation 5, without restarts.
    """
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    share = min(1.0, (done - config.warmup) / (1 - config.warmup)) if config.warmup < 1 else 0.0
    lowest = config.learning_rate * config.final_learning_rate
    return lowest + (config.learning_rate - lowest) * (1 + math.cos(math.pi * share)) / 2
