"""Metrics against definitions written out naively, and against scikit-learn where it has them."""

import math

import numpy as np
import pytest
import torch
from tiny_ratings import interactions

from lspm_models import recommender_metrics as metrics
from lspm_models.data.interactions import Interactions
from lspm_models.data.rating_splits import k_fold


def naive(ranked, relevant):
    """The metrics of one user, of a list of items and a set of them."""
    hits = [item in relevant for item in ranked]
    ideal = sum(1 / math.log2(place + 2) for place in range(min(len(relevant), len(ranked))))
    first = next((place + 1 for place, hit in enumerate(hits) if hit), None)
    precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
    return {
        "precision": sum(hits) / len(ranked),
        "recall": sum(hits) / len(relevant),
        "map": sum(precisions) / min(len(relevant), len(ranked)),
        "ndcg": sum(hit / math.log2(place + 2) for place, hit in enumerate(hits)) / ideal,
        "hit_rate": float(any(hits)),
        "mrr": 0.0 if first is None else 1 / first,
    }


@pytest.fixture
def ranking():
    """Scores of all items by users who have a relevant one, their ranking, and what is relevant."""
    training, held_out = next(k_fold(interactions(), 4))
    scores = torch.rand(40, 30)
    users = held_out.users.unique()
    return training, held_out, scores, users


@pytest.mark.parametrize("k", [1, 5, 30, 33])
def test_ranking_metrics_are_their_definitions(ranking, k):
    training, held_out, scores, users = ranking
    ranked = metrics.top_items(lambda some: scores[some], users, k, training)
    found = metrics.ranking_metrics(ranked, users, held_out)
    for place, user in enumerate(users.tolist()):
        seen = set(training.items[training.users == user].tolist())
        order = [item for item in scores[user].argsort(descending=True).tolist() if item not in seen]
        mine = [item for item in ranked[place].tolist() if item >= 0]
        assert mine == order[:k]
        expected = naive(
            order[:k] + [-1] * (k - len(order)), set(held_out.items[held_out.users == user].tolist())
        )
        assert {name: values[place].item() for name, values in found.items()} == pytest.approx(expected)


def test_duplicates_count_once():
    relevant = Interactions.from_arrays([0, 0, 0], [0, 1, 1], [5, 5, 5])
    found = metrics.ranking_metrics(torch.tensor([[1, 0]]), torch.tensor([0]), relevant)
    assert {name: values.item() for name, values in found.items()} == dict.fromkeys(found, 1.0)


def test_users_without_a_relevant_item_are_refused(ranking):
    _, held_out, scores, users = ranking
    only = held_out.subset(held_out.users > 0)
    ranked = metrics.top_items(lambda some: scores[some], users, 3)
    with pytest.raises(ValueError, match=r"^metrics: users must have a relevant item, got 1 without$"):
        metrics.ranking_metrics(ranked, users, only)


def test_the_whole_catalogue_is_ranked_a_few_users_at_a_time(ranking, monkeypatch):
    training, _, scores, users = ranking
    whole = metrics.top_items(lambda some: scores[some], users, 5, training)
    monkeypatch.setattr(metrics, "MOST_SCORES", 100)
    sizes = []

    def few(some):
        sizes.append(len(some))
        return scores[some]

    assert torch.equal(metrics.top_items(few, users, 5, training), whole)
    assert max(sizes) == 3


@pytest.mark.parametrize("biased", [True, False])
def test_products_rank_as_their_scores_do(ranking, biased):
    training, _, _, users = ranking
    of_users, of_items = torch.randn(40, 6), torch.randn(30, 6)
    bias = torch.randn(30) if biased else None
    scores = of_users @ of_items.T + (bias if biased else 0)
    for count, seen in ((5, training), (40, training), (5, None)):
        ranked = metrics.top_products((of_users[users], of_items, bias), users, count, seen)
        assert torch.equal(ranked, metrics.top_items(lambda some: scores[some], users, count, seen))


def test_ndcg_against_scikit_learn(ranking):
    sklearn = pytest.importorskip("sklearn.metrics")
    _, held_out, scores, users = ranking
    found = metrics.ranking_metrics(metrics.top_items(lambda some: scores[some], users, 7), users, held_out)
    relevance = np.zeros((40, 30))
    relevance[held_out.users, held_out.items] = 1
    chosen = scores[users].numpy()
    expected = sklearn.ndcg_score(relevance[users], chosen, k=7)
    assert found["ndcg"].mean().item() == pytest.approx(expected)
    whole = metrics.ranking_metrics(metrics.top_items(lambda some: scores[some], users, 30), users, held_out)
    expected = sklearn.label_ranking_average_precision_score(relevance[users], chosen)
    assert whole["map"].mean().item() == pytest.approx(expected)


def test_errors_of_ratings():
    predicted, ratings = torch.tensor([1.0, 2.5, 4.0]), torch.tensor([2.0, 2.5, 2.0])
    assert metrics.rmse(predicted, ratings) == pytest.approx(math.sqrt(5 / 3))
    assert metrics.mae(predicted, ratings) == pytest.approx(1.0)


def test_log_loss_and_auc_of_probabilities():
    labels = torch.rand(200) < 0.3
    probabilities = (torch.rand(200) * 8).round() / 8  # with ties, 0 and 1
    positive, negative = probabilities[labels].tolist(), probabilities[~labels].tolist()
    above = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    assert metrics.auc(probabilities, labels) == pytest.approx(above / (len(positive) * len(negative)))
    assert math.isnan(metrics.auc(probabilities, torch.ones(200)))
    eps = np.finfo(np.float64).eps
    clipped = [min(max(p, eps), 1 - eps) for p in probabilities.tolist()]
    logs = [math.log(p if label else 1 - p) for p, label in zip(clipped, labels.tolist(), strict=True)]
    assert metrics.log_loss(probabilities, labels) == pytest.approx(-sum(logs) / 200)


def test_log_loss_auc_and_errors_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, probabilities = torch.rand(500) < 0.4, (torch.rand(500, dtype=torch.float64) * 20).round() / 20
    pair = labels.numpy(), probabilities.numpy()
    assert metrics.auc(probabilities, labels) == pytest.approx(sklearn.roc_auc_score(*pair))
    assert metrics.log_loss(probabilities, labels) == pytest.approx(sklearn.log_loss(*pair))
    numbers = labels.double().numpy(), pair[1]
    assert metrics.rmse(probabilities, labels) == pytest.approx(sklearn.root_mean_squared_error(*numbers))
    assert metrics.mae(probabilities, labels) == pytest.approx(sklearn.mean_absolute_error(*numbers))


def test_breadth_and_novelty():
    training = Interactions.from_arrays([0, 1, 2, 3, 0, 1, 0, 0], [9, 9, 9, 9, 8, 8, 7, 7], [1] * 8)
    ranked = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    found = metrics.novelty(ranked, training).tolist()
    assert found[:2] == [0.5, 2.0]  # -log2 of 4/4, 2/4 and 1/4, the duplicate counted once
    assert math.isnan(found[2])
    assert metrics.coverage(ranked, 12) == 0.25
