"""Deep recommenders: embeddings of all that is known of a user and an item, crossed, and a network of them.

Sources: Cheng et al., Wide & Deep Learning for Recommender Systems, 2016; Guo et al., DeepFM, 2017; Wang et
al., DCN V2, 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels import linear
from lspm_models.data.interactions import Interactions
from lspm_models.models.recommender_fields import damped_biases, fields_of
from lspm_models.options import option

KINDS = {
    "mlp": "the network alone",
    "wide-deep": "beside it a weight of every user and item",
    "deepfm": "beside it such weights, and the products of all embeddings",
    "dcn": "beside it such weights, and a cross network",
}
ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class RecommenderConfig:
    """The shape of a deep recommender."""

    model: str = option("deepfm", "; ".join(f"{name}: {text}" for name, text in KINDS.items()))
    width: int = option(32, "numbers in an embedding")
    hidden: int = option(128, "features of the network's first layer; its second has half as many")
    activation: str = option("relu", "between its layers", choices=tuple(ACTIVATIONS))
    crosses: int = option(2, "layers of the cross network of a dcn")
    dropout: float = option(0.2, "probability of dropping a feature in training")
    history: int = option(200, "ratings of a user, and of an item, that the model sees, the last; 0 for none")

    def __post_init__(self) -> None:
        if self.model not in KINDS:
            raise ValueError(f"model: name must be one of {', '.join(KINDS)}, got {self.model!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"model: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        for name, least in (("width", 1), ("hidden", 2), ("crosses", 1), ("history", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"model: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model: dropout must be at least 0 and less than 1, got {self.dropout}")


class MLP(nn.Module):
    """Three layers, y = W3 s(W2 s(W1 x + b1) + b2) + b3; the outermost s is the task's."""

    def __init__(self, inputs: int, hidden: int, activation: str, dropout: float, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*sizes) for sizes in ((inputs, hidden), (hidden, hidden // 2), (hidden // 2, outputs))
        )
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(linear(x, layer.weight, layer.bias))
            x = F.dropout(x, self.dropout, self.training)
        return self.layers[-1](x)


class Cross(nn.Module):
    """Layers x0 * (W x + b) + x; DCN V2, equation 1."""

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, features) for _ in range(layers))
        self.last = nn.Linear(features, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = first * linear(x, layer.weight, layer.bias) + x
        return self.last(x)


class Recommender(nn.Module):
    """A score of a user and an item.

    Args:
        config: the shape.
        training: brings the catalogue, the side features, the histories, and where the weights of users and
            items begin: at their damped means, divided by `deviation`.
        deviation: what a score of 1 means in ratings.
    """

    def __init__(self, config: RecommenderConfig, training: Interactions, deviation: float = 1.0) -> None:
        super().__init__()
        self.config = config
        options = {"most": config.history, "dropout": config.dropout}
        self.users, self.items = fields_of(training, config.width, **options)
        features = (self.users.count + self.items.count) * config.width + self.users.dense + self.items.dense
        self.mlp = MLP(features, config.hidden, config.activation, config.dropout)
        self.cross = Cross(features, config.crosses) if config.model == "dcn" else None
        self.wide = config.model != "mlp"
        if self.wide:
            _, of_users, of_items = damped_biases(training)
            self.user_weight = nn.Parameter(of_users[:, None] / deviation)
            self.item_weight = nn.Parameter(of_items[:, None] / deviation)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores (B,) of pairs of users (B,) and items (B,)."""
        return self._score(self._side("user", users, items), self._side("item", items, users))

    def scores(self, users: Tensor, pairs: int = 1 << 16) -> Tensor:
        """Scores (B, I) of users (B,) with all items, `pairs` at a time; as of items new to them."""
        everything = torch.arange(len(self.items.id), device=users.device)
        of_users, of_items = self._side("user", users), self._side("item", everything)
        step = max(1, pairs // len(everything))
        parts = []
        for first in range(0, len(users), step):
            some = [part[first : first + step] for part in of_users]
            count = len(some[0])
            left = [part.repeat_interleave(len(everything), 0) for part in some]
            right = [part.repeat(count, *[1] * (part.dim() - 1)) for part in of_items]
            parts.append(self._score(left, right).view(count, -1))
        return torch.cat(parts)

    def _side(self, side: str, rows: Tensor, others: Tensor | None = None) -> list[Tensor]:
        """Returns embeddings (B, F, D), numbers (B, M) and weights (B, 1) of rows."""
        embeddings, numbers = (self.users if side == "user" else self.items)(rows, others)
        weights = F.embedding(rows, getattr(self, f"{side}_weight")) if self.wide else numbers[:, :0]
        return [embeddings, numbers, weights]

    def _score(self, user: list[Tensor], item: list[Tensor]) -> Tensor:
        embeddings = torch.cat((user[0], item[0]), 1)
        x = torch.cat((embeddings.flatten(1), user[1], item[1]), 1)
        score = self.mlp(x)[:, 0] + torch.cat((user[2], item[2]), 1).sum(1)
        if self.config.model == "deepfm":
            # Of all pairs of fields: half of what the square of the sum has beyond the sum of the squares.
            squares = embeddings.sum(1).square() - embeddings.square().sum(1)
            score = score + squares.sum(1) / 2
        if self.cross is not None:
            score = score + self.cross(x)[:, 0]
        return score
