"""Recommenders for the scripts: which there are, how they are trained, and the way back to a trained one."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lspm_models.checkpoint import copy_weights, read_state, read_tensors
from lspm_models.data.interaction_store import load_interactions
from lspm_models.data.interactions import Interactions
from lspm_models.data.ratings import RatingConfig, RatingData, prepare_ratings
from lspm_models.factorization_job import FactorizationJob
from lspm_models.fit_config import FitConfig
from lspm_models.models.recommender import KINDS, Recommender, RecommenderConfig
from lspm_models.models.two_tower import TwoTower, TwoTowerConfig
from lspm_models.options import Parser, read_config
from lspm_models.run_folder import find_checkpoint, read_run
from lspm_models.scripts import Run, train
from lspm_models.tasks.recommendation import ClickPrediction, RatingRegression, Recommendation, Retrieval

PREDICTS = ("ratings", "clicks")

TRAINING = """\
Train a recommender. Without any option it learns MovieLens-100k, from the package recbole, and what is known
of its people and films. The run folder gets the ratings and checkpoints and, but for --model mf, log.csv,
loss.png and TensorBoard events; Ctrl-C saves first. In brackets stands what holds without the option."""

EXAMPLES = (
    "recommend.py train --config python/configs/recommender_ml100k.toml --out runs/films",
    "recommend.py train --model two-tower --data plays.csv --columns user=listener item=song",
    "recommend.py train --data ratings.csv --items films.csv --predicts clicks --split time",
    "recommend.py train --resume runs/films --steps 1000",
)


class Model(Protocol):
    """What evaluating and recommending need of a trained model, whatever it is; ids are internal ones."""

    def predict(self, users: Tensor, items: Tensor) -> Tensor:
        """Returns what is predicted of pairs (B,): ratings, probabilities or scores."""

    def scores(self, users: Tensor) -> Tensor:
        """Returns the same of users (B,) with all items, (B, I)."""


@dataclass(frozen=True)
class DeepOptions(RecommenderConfig):
    """A deep recommender and what it predicts."""

    predicts: str = field(
        default="ratings",
        metadata={"help": "ratings, or the probability of one of --positive or more", "choices": PREDICTS},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predicts not in PREDICTS:
            raise ValueError(f"model: predicts must be one of {', '.join(PREDICTS)}, got {self.predicts!r}")

    def task(self, training: Interactions, data: RatingConfig) -> Recommendation:
        """Makes the task, with random weights."""
        shape = RecommenderConfig(
            **{item.name: getattr(self, item.name) for item in fields(RecommenderConfig)}
        )
        ratings = training.ratings.double()
        if self.predicts == "clicks":
            share = (ratings >= data.positive).double().mean().item()
            # A logistic curve of so many standard deviations' width has the slope of the normal one.
            return ClickPrediction(
                Recommender(shape, training, spread_of(ratings) / 1.7), data.positive, share
            )
        deviation = spread_of(ratings)
        model = Recommender(shape, training, deviation)
        return RatingRegression(model, ratings.mean().item(), deviation, training.scale)


@dataclass(frozen=True)
class TowerOptions(TwoTowerConfig):
    """Two towers, which predict what somebody takes next."""

    @property
    def predicts(self) -> str:
        """What the numbers are."""
        return "scores"

    def task(self, training: Interactions, data: RatingConfig) -> Recommendation:
        """Makes the task, with random weights."""
        return Retrieval(TwoTower(TwoTowerConfig(**asdict(self)), training), training)


def spread_of(ratings: Tensor) -> float:
    """Returns the standard deviation, or 1 where all are the same."""
    return ratings.std(correction=0).item() or 1.0


@dataclass(frozen=True)
class RecommenderJob:
    """One kind of recommender for recommend.py, a scripts.Job as far as that needs one.

    Args:
        options: the config class of its model.
        training: options of fit() that differ from its own.
    """

    options: type
    training: dict[str, Any]

    @property
    def sections(self) -> dict[str, type]:
        """The config classes."""
        return {"model": self.options, "data": RatingConfig, "training": FitConfig}

    @property
    def defaults(self) -> dict[str, dict]:
        """Options by section that differ from those of the classes."""
        return {"training": self.training}

    def add_options(self, parser: Parser) -> None:
        parser.add_config("model", self.options)
        parser.add_config("ratings", RatingConfig)
        parser.add_config("training", FitConfig, self.training)

    def train(self, program: str, run: Run) -> int:
        """Trains and says where everything is; returns the exit code."""
        with run.processes.first_before_others():
            training, held_out = prepare_ratings(run.data, run.folder, run.report)
        torch.manual_seed(run.training.seed)
        data = RatingData(
            training,
            held_out,
            run.training.batch_size,
            validation_batches=run.training.evaluation_batches,
            seed=run.training.seed,
            process=run.processes.rank,
            processes=run.processes.count,
        )
        return train(program, run, self, run.model.task(training, run.data), data)

    def settings(self, run: Run, task: Recommendation) -> dict:
        return asdict(run.model)

    def shape(self, task: Recommendation) -> str:
        shape = task.config
        history = f", histories of {shape.history}" if shape.history else ""
        return f"{shape.model}, {shape.width} wide, {shape.hidden} hidden features{history}"

    def finish(self, run: Run, task: Recommendation, data: RatingData) -> None:
        if run.processes.first:
            user = shlex.quote(str(data.known.user_ids.names[int(data.known.users[0])]))
            run.report(f"try it     python python/recommend.py evaluate {run.quoted}")
            run.report(f"           python python/recommend.py recommend {run.quoted} --user {user}")

    def load(
        self, path: Path, device: str | torch.device, training: Interactions, data: RatingConfig
    ) -> Model:
        """Loads a checkpoint.

        Raises:
            ValueError: its parts do not fit each other.
        """
        content = read_state(path)["settings"]["model"]
        try:
            options = self.options(**content)
        except TypeError as error:
            raise ValueError(f"checkpoint: {path} must hold a recommender, got {content!r}") from error
        task = options.task(training, data)
        copy_weights(read_tensors(path / "model.safetensors"), task, path)
        return task.to(device).eval()


# Every model by its name. Another one, trained in its own way, needs `sections`, `defaults`, `add_options`,
# `train` and `load` as above; scripts.train is only for those that fit() trains.
DEEP = RecommenderJob(
    DeepOptions,
    {
        "steps": 480,
        "batch_size": 1024,
        "learning_rate": 2e-3,
        "final_learning_rate": 0.0,
        "weight_decay": 1.0,
        "evaluation_batches": 100,
    },
)
TOWERS = RecommenderJob(
    TowerOptions,
    {
        "steps": 200,
        "batch_size": 1024,
        "learning_rate": 2e-3,
        "final_learning_rate": 0.0,
        "weight_decay": 2.0,
        "evaluation_batches": 100,
    },
)
JOBS: dict[str, RecommenderJob | FactorizationJob] = {
    **dict.fromkeys(KINDS, DEEP),
    "two-tower": TOWERS,
    "mf": FactorizationJob(),
}


def job_of(arguments: Sequence[str]) -> RecommenderJob | FactorizationJob:
    """Returns the job of the model that --model names, or else the config file or run given.

    Raises:
        ValueError: there is no model of this name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model", "--config", "--resume"):
        parser.add_argument(option, nargs="?")
    given, _ = parser.parse_known_args(arguments)
    name = given.model
    for source, read in ((given.config, read_config), (given.resume, read_run)):
        if source is not None and (name is None or read is read_run):
            model = read(Path(source)).get("model")
            known = model.get("model") if isinstance(model, dict) else None
            if name is not None and known in JOBS and _job(known) is not _job(name):
                raise ValueError(f"model: name must be {known} as in {source}, got {name}")
            name = known if name is None else name
    return _job("deepfm" if name is None else name)


def _job(name: str) -> RecommenderJob | FactorizationJob:
    if name not in JOBS:
        raise ValueError(f"model: name must be one of {', '.join(JOBS)}, got {name!r}")
    return JOBS[name]


@dataclass(frozen=True)
class Trained:
    """A trained model with the ratings it knows and those that were set aside."""

    folder: Path
    model: Model
    training: Interactions
    held_out: Interactions
    data: RatingConfig
    predicts: str


def load_recommender(folder: str | Path, device: str | torch.device = "cpu") -> Trained:
    """Loads a run folder, with its newest checkpoint, or one checkpoint in it.

    Raises:
        ValueError: there is none, or its parts do not fit each other.
    """
    path = find_checkpoint(folder).resolve()
    run = path.parents[1]
    settings = read_run(run)
    try:
        job = JOBS[settings["model"]["model"]]
        data = RatingConfig(**{**settings["data"], "columns": tuple(settings["data"]["columns"])})
        predicts = job.options(**settings["model"]).predicts
    except (KeyError, TypeError) as error:
        raise ValueError(f"recommend: {run} must be a run of a recommender, got another") from error
    training, held_out = data.parts(load_interactions(run))
    return Trained(run, job.load(path, device, training, data), training, held_out, data, predicts)
