"""Recommendation: from scores of users and items to ratings, to probabilities of a click, to a ranking.

All take pairs (B, 2) int64 of users and items, and targets (B, 2) float32 of a rating and its weight. What
evaluation and recommending want of a trained task is `predict(users, items)` and `scores(users)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.data.interactions import Interactions
from lspm_models.models.recommender import Recommender, RecommenderConfig
from lspm_models.models.two_tower import TwoTower, TwoTowerConfig, in_batch_softmax
from lspm_models.recommender_metrics import spread

HITS_AT = 10


class Recommendation(nn.Module):
    """What the tasks share.

    Args:
        model: gives the scores.
    """

    unit = "rating"
    metric_names: tuple[str, ...] = ()

    def __init__(self, model: Recommender | TwoTower) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> RecommenderConfig | TwoTowerConfig:
        """The model's."""
        return self.model.config

    def predict(self, users: Tensor, items: Tensor) -> Tensor:
        """What is predicted of pairs of users (B,) and items (B,)."""
        return self.meaning(self.model(users, items))

    def scores(self, users: Tensor) -> Tensor:
        """What is predicted of users (B,) with all items, (B, I), all of them as if new to the users."""
        return self.meaning(self.model.scores(users))

    def meaning(self, scores: Tensor) -> Tensor:
        """What the model's scores mean."""
        return scores

    def loss(self, pairs: Tensor, targets: Tensor) -> Tensor:
        """The weighted mean loss of a batch."""
        return weighted_mean(self.losses(self.model(*pairs.unbind(1)).float(), targets[:, 0]), targets[:, 1])

    def losses(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """The loss of each score (B,)."""
        raise NotImplementedError


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of values (B,) by weights (B,); 0 where all weights are."""
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


class RatingRegression(Recommendation):
    """Ratings by least squares: mean + deviation * score, clipped to the scale where they are predicted.

    Args:
        model: gives the scores.
        mean: of the training ratings.
        deviation: of the training ratings; losses are in its square, so that 1 is what the mean reaches.
        scale: the lowest and the highest rating.
    """

    metric_names = ("rmse", "mae")

    def __init__(self, model: Recommender, mean: float, deviation: float, scale: tuple[float, float]) -> None:
        super().__init__(model)
        self.mean, self.deviation, self.scale = mean, deviation, scale

    def meaning(self, scores: Tensor) -> Tensor:
        """Ratings of scores."""
        return (self.mean + self.deviation * scores.float()).clamp(*self.scale)

    def losses(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """The squared errors, in squared deviations, before clipping."""
        return (scores - (ratings - self.mean) / self.deviation).square()

    def evaluate(self, pairs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and what metrics() wants summed over all batches."""
        scores = self.model(*pairs.unbind(1)).float()
        errors = (self.meaning(scores) - targets[:, 0]).double()
        sums = errors.square().sum(), errors.abs().sum(), errors.new_tensor(len(errors))
        return weighted_mean(self.losses(scores, targets[:, 0]), targets[:, 1]), torch.stack(sums)

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the root of the mean squared error, and the mean absolute error."""
        squared, absolute, count = sums
        return {"rmse": (squared / count) ** 0.5, "mae": absolute / count}


class ClickPrediction(Recommendation):
    """Probabilities that a rating is `positive` or more, by the logistic loss.

    Args:
        model: gives the scores.
        positive: the least rating that is a click.
        share: of clicks among the training ratings, where a score of 0 stands.
    """

    metric_names = ("accuracy",)

    def __init__(self, model: Recommender, positive: float, share: float) -> None:
        super().__init__(model)
        self.positive, self.offset = positive, torch.tensor(share).logit(1e-6).item()

    def meaning(self, scores: Tensor) -> Tensor:
        """Probabilities of scores."""
        return torch.sigmoid(scores.float() + self.offset)

    def losses(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """The logistic losses, in nats."""
        clicks = (ratings >= self.positive).float()
        return F.binary_cross_entropy_with_logits(scores + self.offset, clicks, reduction="none")

    def evaluate(self, pairs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and what metrics() wants summed over all batches."""
        scores = self.model(*pairs.unbind(1)).float()
        right = ((scores + self.offset > 0) == (targets[:, 0] >= self.positive)).double().sum()
        loss = weighted_mean(self.losses(scores, targets[:, 0]), targets[:, 1])
        return loss, torch.stack((right, right.new_tensor(len(targets))))

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the share of pairs whose more probable side is right."""
        right, count = sums
        return {"accuracy": right / count}


class Retrieval(Recommendation):
    """A ranking of the catalogue, by a softmax over the items of a batch; of ratings only weights count.

    Args:
        model: gives the vectors.
        training: how often each item is asked for, and what its users have seen already.
    """

    metric_names = (f"hit_rate_{HITS_AT}",)

    def __init__(self, model: TwoTower, training: Interactions) -> None:
        super().__init__(model)
        counts = training.popularity().clamp(min=1)
        places, order = training.by_user()
        buffers = {"log_shares": (counts / counts.sum()).log(), "offsets": places}
        for name, value in {**buffers, "seen": training.items[order]}.items():
            self.register_buffer(name, value, persistent=False)

    def loss(self, pairs: Tensor, targets: Tensor) -> Tensor:
        """The weighted mean over the batch of the corrected softmax loss, in nats."""
        users, items = pairs.unbind(1)
        vectors = self.model.users(users, items), self.model.items(items, users)
        logits = (vectors[0] @ vectors[1].T).float() / self.config.temperature
        losses = in_batch_softmax(logits, self.met(users, items), self.log_shares[items])
        return weighted_mean(losses, targets[:, 1])

    def products(self, users: Tensor) -> tuple[Tensor, Tensor, None]:
        """What recommender_metrics.top_products ranks by."""
        return self.model.products(users)

    def met(self, users: Tensor, items: Tensor) -> Tensor:
        """Tells which of items (M,) each of users (B,) has met in training, (B, M) bool."""
        names, columns = items.unique(return_inverse=True)
        column_of = names.new_full((len(self.log_shares),), -1)
        column_of[names] = torch.arange(len(names), device=names.device)
        rows, places = spread(self.offsets, users)
        found = column_of[self.seen[places]]
        table = torch.zeros(len(users), len(names), dtype=torch.bool, device=users.device)
        table[rows[found >= 0], found[found >= 0]] = True
        return table[:, columns]

    def evaluate(self, pairs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and of how many pairs the item is among the first of all that the user has not seen."""
        users, items = pairs.unbind(1)
        scores = self.model.scores(users).float()
        own = scores.gather(1, items[:, None])
        rows, places = spread(self.offsets, users)
        scores = scores.index_put((rows, self.seen[places]), scores.new_tensor(-torch.inf))
        found = ((scores > own).sum(1) < HITS_AT).double().sum()
        return self.loss(pairs, targets), torch.stack((found, found.new_tensor(len(users))))

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the share of pairs whose item is among the first."""
        found, count = sums
        return {self.metric_names[0]: found / count}
