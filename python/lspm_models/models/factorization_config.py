"""How ratings are factorised: the settings of every method, and what does well on MovieLens-100k."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields

from lspm_models.models.factor_methods import METHODS

SOLVERS = ("cholesky", "cg")
# What does well on MovieLens-100k.
DEFAULTS = {
    "sgd": {"factors": 128, "epochs": 100, "lr": 0.01, "lr_decay": 0.98, "reg": 0.09},
    "als": {"factors": 32, "epochs": 15, "reg": 0.2, "weighted_reg": 1.0},
    "implicit-als": {"factors": 64, "epochs": 15, "reg": 10.0, "alpha": 1.0},
    "nmf": {"factors": 4, "epochs": 100, "reg": 0.1},
    "bpr": {"factors": 64, "epochs": 60, "lr": 0.05, "reg": 0.01},
    "svd": {"factors": 16, "epochs": 4, "reg": 10.0},
}


@dataclass(frozen=True)
class MatrixFactorizationConfig:
    """How to factorise.

    Args:
        method: sgd, als and svd of ratings, nmf of ratings that are not negative, bpr and implicit-als of
            what users chose.
        factors: of each user and item.
        epochs: passes over the ratings, sweeps, or power iterations of svd.
        lr: learning rate of sgd and bpr.
        lr_decay: what lr is multiplied by from epoch to epoch.
        reg: L2; of svd, of who is folded in later.
        weighted_reg: als multiplies reg by a row's number of ratings to this power.
        alpha: what implicit-als multiplies ratings by to get a confidence.
        solver: of als, "cholesky" or "cg".
        nonnegative: keeps sgd's factors at 0 and above.
        std: of the random factors in the beginning.
        seed: of all that is random.
    """

    method: str = "sgd"
    factors: int = 128
    epochs: int = 100
    lr: float = 0.01
    lr_decay: float = 1.0
    reg: float = 0.1
    weighted_reg: float = 0.0
    alpha: float = 1.0
    solver: str = "cholesky"
    nonnegative: bool = False
    std: float = 0.03
    seed: int = 0

    @classmethod
    def of(cls, method: str = "sgd", **options) -> MatrixFactorizationConfig:
        """Returns what does well for a method, with other options where they are given."""
        return cls(method=method, **(DEFAULTS.get(method, {}) | options))

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"mf: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"mf: solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        for name, least in (("factors", 1), ("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise ValueError(f"mf: {name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"mf: {name} must be at least {least}, got {value}")
        for name in ("lr", "lr_decay", "std", "alpha"):
            if not 0 < self._number(name) < float("inf"):
                raise ValueError(f"mf: {name} must be positive, got {getattr(self, name)}")
        for name in ("reg", "weighted_reg"):
            if not 0 <= self._number(name) < float("inf"):
                raise ValueError(f"mf: {name} must be finite and at least 0, got {getattr(self, name)}")
        for item in fields(self):
            if item.name not in ("method", "solver", "nonnegative"):  # JSON has none of NumPy's
                kind = float if isinstance(item.default, float) else int
                object.__setattr__(self, item.name, kind(getattr(self, item.name)))

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, numbers.Real):
            raise ValueError(f"mf: {name} must be a number, got {value!r}")
        return value
