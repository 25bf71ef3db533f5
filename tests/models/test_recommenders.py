"""Recommenders: their formulas, what they may see, and that they learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_ratings import interactions, write_recbole

from lspm_models.data.interactions import Features, Interactions
from lspm_models.data.rating_files import read_interactions
from lspm_models.data.rating_splits import k_fold
from lspm_models.data.ratings import RatingBatches, RatingConfig, RatingData
from lspm_models.fit_config import FitConfig
from lspm_models.models.recommender import KINDS, MLP, Recommender, RecommenderConfig
from lspm_models.models.recommender_fields import Fields, History, damped_biases
from lspm_models.models.two_tower import TwoTower, TwoTowerConfig, in_batch_softmax
from lspm_models.recommender_job import DeepOptions, TowerOptions
from lspm_models.tasks.recommendation import ClickPrediction, RatingRegression, Retrieval
from lspm_models.train import fit

SMALL = {"width": 8, "hidden": 16}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    found = read_interactions(write_recbole(tmp_path_factory.mktemp("ratings") / "tiny"))
    return next(k_fold(found, 5))


def test_damped_biases_are_at_rest():
    found = interactions()
    mean, of_users, of_items = damped_biases(found, rounds=100)
    rest = found.ratings - mean - of_users[found.users] - of_items[found.items]
    assert mean == pytest.approx(found.ratings.mean().item())
    for users, place in ((of_users, found.users), (of_items, found.items)):
        sums = torch.zeros(len(users)).index_add(0, place, rest)
        assert torch.allclose(sums, 5 * users, atol=1e-4)  # the derivative of the damped squares


def test_a_history_is_what_a_row_met_but_for_the_partner_in_question():
    rows, partners = torch.tensor([1, 0, 1, 1, 1]), torch.tensor([3, 0, 2, 3, 1])
    residuals = torch.tensor([9.0, 1, 2, 3, 4])
    history = History(rows, partners, residuals, (3, 4), 5, most=3, dropout=0.5).eval()
    found, counts = history(torch.tensor([1, 1, 2, 0]), torch.tensor([2, 0, 0, 0]))
    assert counts.tolist() == [2, 3, 0, 0]
    met, rated = history.met, history.rated  # the first 3 is beyond the most
    expected = torch.stack((met[3] + met[1], 3 * rated[3] + 4 * rated[1])) / math.sqrt(3)
    assert torch.allclose(found[0], expected, atol=1e-6)
    expected = torch.stack((met[2] + met[3] + met[1], 2 * rated[2] + 3 * rated[3] + 4 * rated[1])) / 2
    assert torch.allclose(found[1], expected, atol=1e-6)
    assert not found[2:].any()
    assert history(torch.tensor([1]), None)[1].tolist() == [3]
    drawn = {int(history.train()(torch.tensor([1]), None)[1]) for _ in range(50)}
    assert drawn == {0, 1, 2, 3}
    assert "partners" not in history.state_dict()


def test_fields_are_means_of_values_and_standardised_numbers(parts):
    training, _ = parts
    fields = Fields(training.item_features, 30, 4)
    embeddings, numbers = fields(torch.arange(30))
    table = training.item_features.categories["class"]
    rows = [
        fields.tables["of_class"][[table.names.index(name) for name in table.labels(i)]].mean(0)
        for i in range(30)
    ]
    assert torch.allclose(embeddings, torch.stack((fields.id, torch.stack(rows)), 1))
    assert numbers.mean().item() == pytest.approx(0, abs=1e-6)
    assert numbers.std().item() == pytest.approx(1)
    assert Fields(Features({"type": table, "a.b": table}), 30, 4).count == 3
    unknown = Fields(Features(numbers={"a": torch.tensor([1.0, 3.0, math.nan])}), 3, 4).numbers
    assert unknown[2] == 0


def test_the_network_is_its_formula():
    mlp, x = MLP(6, 8, "sigmoid", 0.0), torch.randn(5, 6)
    (w1, b1), (w2, b2), (w3, b3) = ((layer.weight, layer.bias) for layer in mlp.layers)
    s = torch.sigmoid
    expected = s(s(s(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3)
    assert torch.allclose(s(mlp(x)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_sum_of_its_parts(parts, kind):
    training, held_out = parts
    model = Recommender(RecommenderConfig(kind, **SMALL), training, deviation=2.0).eval()
    users, items = held_out.users[:9], held_out.items[:9]
    (of_users, dense), (of_items, more) = model.users(users, items), model.items(items, users)
    embeddings = torch.cat((of_users, of_items), 1)
    x = torch.cat((embeddings.flatten(1), dense, more), 1)
    expected = model.mlp(x)[:, 0]
    if kind != "mlp":
        _, b_u, b_i = damped_biases(training)
        expected = expected + (b_u[users] + b_i[items]) / 2
    if kind == "deepfm":
        fields = embeddings.shape[1]
        for a in range(fields):
            for b in range(a + 1, fields):
                expected = expected + (embeddings[:, a] * embeddings[:, b]).sum(1)
    if kind == "dcn":
        crossed = x
        for layer in model.cross.layers:
            crossed = x * (crossed @ layer.weight.T + layer.bias) + crossed
        expected = expected + (crossed @ model.cross.last.weight.T)[:, 0]
    assert torch.allclose(model(users, items), expected, atol=1e-5)
    # Nobody has seen what is set aside, so the whole catalogue's scores are the same.
    table = model.scores(torch.arange(40), pairs=70)
    assert torch.allclose(table[users, items], expected, atol=1e-5)


def test_a_rating_does_not_explain_itself(parts):
    """Neither its value nor that it was given changes what is said of its own pair."""
    training, _ = parts
    model = Recommender(RecommenderConfig(**SMALL), training).eval()
    before = model(training.users[:1], training.items[:1])
    for side in (model.users, model.items):
        mine = side.history.partners == (training.items if side is model.users else training.users)[0]
        side.history.residuals[mine] += 5
    assert torch.equal(model(training.users[:1], training.items[:1]), before)
    assert not torch.allclose(model.scores(training.users[:1])[0, training.items[0]], before)


def test_the_softmax_corrects_for_popularity_and_spares_what_was_met():
    logits, met, log_shares = torch.randn(4, 4), torch.rand(4, 4) < 0.5, torch.randn(4)
    met[0, 0], met[1, 1] = True, False
    found = in_batch_softmax(logits, met, log_shares)
    for row in range(4):
        others = [j for j in range(4) if j == row or not met[row, j]]
        total = sum(math.exp(logits[row, j] - log_shares[j]) for j in others)
        assert found[row].item() == pytest.approx(
            math.log(total) - (logits[row, row] - log_shares[row]).item()
        )


def test_with_every_item_in_the_batch_the_correction_gives_the_whole_softmax():
    """Sampled in proportion to Q, the corrected sum estimates the sum over the catalogue."""
    generator = torch.Generator().manual_seed(0)
    q, scores = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.0, 1.0, 2.0])
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    estimate = (scores[drawn] - q[drawn].log()).exp().mean()
    assert estimate.item() == pytest.approx(scores.exp().sum().item(), rel=0.01)


def test_tasks_give_what_they_say(parts):
    training, held_out = parts
    users, items = held_out.users, held_out.items
    pairs = torch.stack((users, items), 1)
    targets = torch.stack((held_out.ratings, torch.rand(len(users))), 1)
    weights = targets[:, 1] / targets[:, 1].sum()
    model = Recommender(RecommenderConfig(**SMALL), training).eval()
    rating = RatingRegression(model, 3.0, 2.0, (1.0, 5.0)).eval()
    raw = 3 + 2 * model(users, items)
    assert torch.allclose(rating.predict(users, items), raw.clamp(1, 5))
    expected = (weights * ((raw - held_out.ratings) / 2) ** 2).sum()
    assert torch.allclose(rating.loss(pairs, targets), expected)
    loss, sums = rating.evaluate(pairs, targets)
    errors = raw.clamp(1, 5) - held_out.ratings
    assert rating.metrics(sums.tolist()) == pytest.approx(
        {"rmse": errors.square().mean().sqrt().item(), "mae": errors.abs().mean().item()}
    )
    assert torch.allclose(loss, expected)
    assert not rating.loss(pairs, targets * torch.tensor([1.0, 0.0])).any()
    click = ClickPrediction(model, 4.0, 0.25).eval()
    p = torch.sigmoid(model(users, items) + math.log(1 / 3))
    liked = (held_out.ratings >= 4).float()
    assert torch.allclose(click.predict(users, items), p)
    expected = (weights * F.binary_cross_entropy(p, liked, reduction="none")).sum()
    assert torch.allclose(click.loss(pairs, targets), expected)
    right = ((p > 0.5) == (liked > 0)).double().mean().item()
    assert click.metrics(click.evaluate(pairs, targets)[1].tolist()) == pytest.approx({"accuracy": right})
    towers = TwoTower(TwoTowerConfig(width=8, hidden=16), training)
    retrieval = Retrieval(towers, training).eval()
    scores = retrieval.scores(users)
    assert torch.allclose(scores.gather(1, items[:, None])[:, 0], retrieval.predict(users, items), atol=1e-4)
    hits = 0
    for user, item, row in zip(users.tolist(), items.tolist(), scores, strict=True):
        new = [i for i in range(30) if i not in training.items[training.users == user]]
        hits += sum(row[i] > row[item] for i in new) < 10
    found = retrieval.metrics(retrieval.evaluate(pairs, targets)[1].tolist())
    assert found == {"hit_rate_10": pytest.approx(hits / len(users))}


def test_who_has_met_what(parts):
    training, _ = parts
    task = TowerOptions(**SMALL).task(training, RatingConfig())
    users, items = torch.tensor([3, 0, 3]), torch.tensor([7, 2, 7, 29, 4])
    pairs = set(zip(training.users.tolist(), training.items.tolist(), strict=True))
    expected = [[(user, item) in pairs for item in items.tolist()] for user in users.tolist()]
    assert task.met(users, items).tolist() == expected


TRAINING = {"batch_size": 64, "learning_rate": 1e-2, "device": "cpu", "evaluate_every": 150}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_tastes(parts, tmp_path, kind):
    """Biases alone leave an error of about 0.9; the two tastes are a product of users and items."""
    training, held_out = parts
    torch.manual_seed(0)
    task = DeepOptions(kind, **SMALL).task(training, RatingConfig())
    config = FitConfig(steps=150, weight_decay=0.3, checkpoint_every=150, **TRAINING)
    fit(task, RatingData(training, held_out, 64), config, tmp_path)
    error = (task.eval().predict(held_out.users, held_out.items) - held_out.ratings).square().mean().sqrt()
    _, b_u, b_i = damped_biases(training)
    biases = training.ratings.mean() + b_u[held_out.users] + b_i[held_out.items] - held_out.ratings
    assert error.item() < 0.7
    assert biases.square().mean().sqrt().item() > 0.8


def test_towers_learn_what_goes_together(parts, tmp_path):
    training, held_out = (part.subset(part.users % 2 == part.items % 2) for part in parts)
    torch.manual_seed(0)
    task = TowerOptions(**SMALL).task(training, RatingConfig())
    data = RatingData(training, held_out, 64)
    config = FitConfig(steps=100, checkpoint_every=100, **TRAINING)
    fit(task, data, config, tmp_path)
    scores = task.eval().scores(torch.tensor([0]))[0].detach()
    new = torch.ones(30, dtype=torch.bool)
    new[training.items[training.users == 0]] = False
    even = torch.arange(30) % 2 == 0
    assert scores[new & even].min() > scores[new & ~even].max()


def test_batches_go_through_every_rating_once_an_epoch_and_go_on():
    pairs, targets = torch.arange(20).view(10, 2), torch.zeros(10, 2)
    batches = RatingBatches(pairs, targets, 4, seed=1)
    rows = torch.cat([batches.next_batch()[0] for _ in range(5)])[:, 0]
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(0, 20, 2))
    assert rows[:10].tolist() != rows[10:].tolist()
    state, following = batches.state(), batches.next_batch()[0]
    again = RatingBatches(pairs, targets, 4, seed=1)
    again.restore(state)
    assert torch.equal(again.next_batch()[0], following)
    shares = [RatingBatches(pairs, targets, 2, seed=1, process=p, processes=2) for p in range(2)]
    both = torch.cat([share.next_batch()[0] for share in shares])[:, 0]
    assert both.tolist() == rows[:4].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecommenderConfig("mf"), "name must be one of mlp, wide-deep, deepfm, dcn, got 'mf'"),
        (lambda: RecommenderConfig(width=0), "width must be at least 1, got 0"),
        (lambda: RecommenderConfig(hidden=1), "hidden must be at least 2, got 1"),
        (lambda: RecommenderConfig(history=-1), "history must be at least 0, got -1"),
        (lambda: RecommenderConfig(dropout=1.0), "dropout must be at least 0 and less than 1, got 1.0"),
        (
            lambda: RecommenderConfig(activation="x"),
            "activation must be one of relu, sigmoid, silu, tanh, got 'x'",
        ),
        (lambda: TwoTowerConfig(temperature=0.0), "temperature must be greater than 0, got 0.0"),
        (lambda: TwoTowerConfig("x"), "name must be two-tower, got 'x'"),
        (lambda: DeepOptions(predicts="x"), "predicts must be one of ratings, clicks, got 'x'"),
    ],
)
def test_shapes_that_cannot_be(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == f"model: {message}"


def test_equal_ratings_do_no_harm():
    found = Interactions.from_arrays([0, 0, 1, 1], [0, 1, 0, 1], [3.0] * 4)
    task = DeepOptions(**SMALL).task(found, RatingConfig()).eval()
    assert task.predict(found.users, found.items).tolist() == [3.0] * 4
