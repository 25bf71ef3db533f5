"""Two towers: a vector of the user and a vector of the item, whose product says how well they go together.

Source: Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.data.interactions import Interactions
from lspm_models.models.recommender import ACTIVATIONS, MLP
from lspm_models.models.recommender_fields import Fields, fields_of
from lspm_models.options import option


@dataclass(frozen=True)
class TwoTowerConfig:
    """The shape of two towers."""

    model: str = option("two-tower", "two-tower, or a deep recommender, which has other options")
    width: int = option(32, "numbers in an embedding, and in the vector at the top of a tower")
    hidden: int = option(128, "features of a tower's first layer; its second has half as many")
    activation: str = option("relu", "between its layers", choices=tuple(ACTIVATIONS))
    temperature: float = option(0.1, "cosines are divided by this before the softmax")
    dropout: float = option(0.2, "probability of dropping a feature in training")
    history: int = option(200, "ratings of a user, and of an item, that a tower sees, the last; 0 for none")

    def __post_init__(self) -> None:
        if self.model != "two-tower":
            raise ValueError(f"model: name must be two-tower, got {self.model!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"model: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        for name, least in (("width", 1), ("hidden", 2), ("history", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"model: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model: dropout must be at least 0 and less than 1, got {self.dropout}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"model: temperature must be greater than 0, got {self.temperature}")


class Tower(nn.Module):
    """A unit vector of a row: the sum of its embeddings and of a network of them."""

    def __init__(self, fields: Fields, config: TwoTowerConfig) -> None:
        super().__init__()
        self.fields = fields
        inputs = fields.count * config.width + fields.dense
        self.mlp = MLP(inputs, config.hidden, config.activation, config.dropout, config.width)

    def forward(self, rows: Tensor, others: Tensor | None = None) -> Tensor:
        """Vectors (B, D) of rows (B,); see Fields.forward."""
        embeddings, numbers = self.fields(rows, others)
        x = torch.cat((embeddings.flatten(1), numbers), 1)
        return F.normalize(embeddings.sum(1) + self.mlp(x), dim=1)


class TwoTower(nn.Module):
    """Cosines of users and items.

    Args:
        config: the shape.
        training: brings the catalogue, the side features and the histories.
    """

    def __init__(self, config: TwoTowerConfig, training: Interactions) -> None:
        super().__init__()
        self.config = config
        options = {"most": config.history, "dropout": config.dropout}
        users, items = fields_of(training, config.width, **options)
        self.users, self.items = Tower(users, config), Tower(items, config)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Cosines over the temperature (B,) of pairs of users (B,) and items (B,)."""
        return (self.users(users, items) * self.items(items, users)).sum(1) / self.config.temperature

    def vectors(self) -> Tensor:
        """Vectors (I, D) of all items."""
        return self.items(torch.arange(len(self.items.fields.id), device=self.items.fields.id.device))

    def products(self, users: Tensor) -> tuple[Tensor, Tensor, None]:
        """Vectors (B, D) of users and (I, D) of all items, whose products rank as scores() do."""
        return self.users(users), self.vectors(), None

    def scores(self, users: Tensor) -> Tensor:
        """Cosines over the temperature (B, I) of users (B,) with all items."""
        return self.users(users) @ self.vectors().T / self.config.temperature


def in_batch_softmax(logits: Tensor, met: Tensor, log_shares: Tensor) -> Tensor:
    """The loss of each row of a batch whose other items serve as negatives, (B,) in nats.

    -log softmax of s_ij - log Q_j at j = i, where Q_j is how often item j stands in a batch: without it,
    popular items would be negatives too often. What a user has met is no negative: beside being wrong, it
    would stand out by being in the user's history, where the item in question is left out.

    Args:
        logits: (B, B) s_ij of user i and item j.
        met: (B, B) bool, whether user i has met item j; the diagonal does not count.
        log_shares: (B,) log Q_j.
    """
    own = torch.arange(len(logits), device=logits.device)
    negatives = met.logical_not().index_put((own, own), met.new_ones(()))
    corrected = (logits - log_shares).masked_fill(~negatives, -torch.inf)
    return F.cross_entropy(corrected, own, reduction="none")
