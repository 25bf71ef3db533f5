"""Matrix factorisation for recommend.py: its options, an epoch loop of its own, and its checkpoints."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lspm_models.checkpoint import checkpoints
from lspm_models.data.interactions import Interactions
from lspm_models.data.ratings import RatingConfig, prepare_ratings
from lspm_models.distributed import Processes
from lspm_models.files import remove
from lspm_models.interruption import Interruption
from lspm_models.models.factor_methods import IMPLICIT, METHODS, UNWEIGHTED
from lspm_models.models.factorization_config import MatrixFactorizationConfig
from lspm_models.models.matrix_factorization import MatrixFactorization
from lspm_models.options import Parser, errors_in_one_line, fail, option
from lspm_models.progress import Progress, counted, duration
from lspm_models.recommender_metrics import mae, rmse
from lspm_models.scripts import Run

OWN = "the method's own"
REPORTS = 10  # lines about the ratings set aside in a run


def _option(value: Any, text: str, /, **metadata: Any) -> Any:
    return option(value, text, **({"default": OWN} if value is None else {}), **metadata)


@dataclass(frozen=True)
class FactorizationOptions:
    """How ratings are factorised."""

    model: str = _option("mf", "matrix factorisation", choices=("mf",))
    method: str = _option(
        "sgd", "sgd, als, nmf and svd of ratings, bpr and implicit-als of choices", choices=tuple(METHODS)
    )
    factors: int | None = _option(None, "of each user and item")
    lr: float | None = _option(None, "learning rate of sgd and bpr")
    lr_decay: float | None = _option(None, "what it is multiplied by from epoch to epoch")
    reg: float | None = _option(None, "L2 regularisation")
    weighted_reg: float | None = _option(None, "als: reg is multiplied by a row's ratings to this power")
    alpha: float | None = _option(None, "implicit-als: confidence is 1 + alpha * rating")
    nonnegative: bool = _option(False, "sgd keeps factors at 0 and above")

    def __post_init__(self) -> None:
        self.config(None, 0)

    @property
    def predicts(self) -> str:
        """What the numbers are."""
        return "scores" if self.method in IMPLICIT else "ratings"

    def config(self, epochs: int | None, seed: int) -> MatrixFactorizationConfig:
        """Returns the method's own settings with these in their place."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "model"}
        given = {name: value for name, value in (own | {"epochs": epochs}).items() if value is not None}
        return MatrixFactorizationConfig.of(**given, seed=seed)


@dataclass(frozen=True)
class FactorizationTraining:
    """How long it is trained."""

    epochs: int | None = _option(None, "passes over the ratings, sweeps, or power iterations of svd")
    seed: int = _option(0, "of the random factors and draws")
    save_every: int = _option(20, "epochs between checkpoints")
    keep_checkpoints: int = _option(2, "checkpoints kept")
    device: str = _option("cpu", "where the factors are", choices=("cpu",))

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("seed", 0), ("save_every", 1), ("keep_checkpoints", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"training: {name} must be at least {least}, got {value}")
        if self.seed >= 2**63:
            raise ValueError(f"training: seed must be below 2 ** 63, got {self.seed}")


class FactorizationJob:
    """The job of --model mf: what recommender_job.RecommenderJob is for models that fit() trains."""

    options = FactorizationOptions

    @property
    def sections(self) -> dict[str, type]:
        """The config classes."""
        return {"model": FactorizationOptions, "data": RatingConfig, "training": FactorizationTraining}

    @property
    def defaults(self) -> dict[str, dict]:
        """Options by section that differ from those of the classes: none."""
        return {}

    def add_options(self, parser: Parser) -> None:
        parser.add_config("model", FactorizationOptions)
        parser.add_config("ratings", RatingConfig)
        parser.add_config("training", FactorizationTraining)

    def train(self, program: str, run: Run) -> int:
        """Trains and says where everything is; returns the exit code, 128 + signal after an interruption.

        Raises:
            ValueError: there are several processes, each of which would write the whole run.
        """
        if (count := Processes.join().count) > 1:
            raise ValueError(f"run: --model mf must be trained by one process, got {count}")
        training, held_out = prepare_ratings(run.data, run.folder, run.report)
        model = MatrixFactorization(run.model.config(run.training.epochs, run.training.seed))
        if run.resume and (found := checkpoints(run.folder / "checkpoints")):
            wanted = model.config
            model = MatrixFactorization.read(found[-1], training)
            model.config = wanted
        config = model.config
        factors, epochs = counted(config.factors, "factor"), counted(config.epochs, "epoch")
        run.report(f"model      {config.method}, {factors}, {epochs}\n")
        if training.weights is not None and config.method in UNWEIGHTED:
            run.report(f"weights    are left out: {config.method} takes each rating as one\n")
        progress, began = Progress(run.report, unit="rating"), time.monotonic()
        every = max(1, config.epochs // REPORTS)

        def after_epoch(epoch: int, loss: float, seconds: float) -> bool:
            speed = len(training) / max(1e-9, time.monotonic() - after_epoch.last)
            after_epoch.last = time.monotonic()
            progress.update(epoch / config.epochs, epoch, loss, speed)
            if epoch % every == 0 or epoch == config.epochs:
                progress.line(f"epoch {epoch:4}  {self.loss_of(model, loss, held_out)}")
            if epoch % run.training.save_every == 0 or epoch == config.epochs or interruption.received:
                self.save(model, run)
            return not interruption.received

        after_epoch.last = began
        with Interruption() as interruption, errors_in_one_line(program):
            try:
                if model.epochs_done < config.epochs:  # else there is nothing left to do
                    model.fit(training, after_epoch)
            except FloatingPointError as error:
                fail(program, str(error), code=1)
            finally:
                progress.close()
        if interruption.received and model.epochs_done < config.epochs:
            run.report(f"\ninterrupted after epoch {model.epochs_done}, which is saved; go on with")
            run.report(f"  python python/{program} --resume {run.quoted}")
            return 128 + interruption.received
        run.report(f"\ntrained    {epochs}; this session took {duration(time.monotonic() - began)}")
        run.report(f"checkpoint {checkpoints(run.folder / 'checkpoints')[-1]}")
        user = shlex.quote(str(training.user_ids.names[int(training.users[0])]))
        run.report(f"try it     python python/recommend.py evaluate {run.quoted}")
        run.report(f"           python python/recommend.py recommend {run.quoted} --user {user}")
        return 0

    def loss_of(self, model: MatrixFactorization, loss: float, held_out: Interactions) -> str:
        """Returns what an epoch came to, on the ratings set aside too where the model predicts ratings."""
        if model.implicit or not len(held_out):
            return f"loss {loss:.4f}"
        found = model.predict(held_out.users, held_out.items)
        errors = rmse(found, held_out.ratings), mae(found, held_out.ratings)
        return f"loss {loss:.4f}, of the ratings set aside RMSE {errors[0]:.4f}, MAE {errors[1]:.4f}"

    def save(self, model: MatrixFactorization, run: Run) -> None:
        folder = run.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        model.write(folder / f"step-{model.epochs_done:08d}")
        for old in checkpoints(folder)[: -run.training.keep_checkpoints]:
            remove(old)

    def load(
        self, path: Path, device: str | torch.device, training: Interactions, data: RatingConfig
    ) -> MatrixFactorization:
        """Loads a checkpoint.

        Raises:
            ValueError: it is none of a factorisation.
        """
        return MatrixFactorization.read(path, training)
