"""MatrixFactorization: each method learns what is there to learn, and what people do with it afterwards."""

import itertools
import math

import pytest
import torch

from lspm_models.data.interactions import Interactions
from lspm_models.models.cold_start import UNBIASED
from lspm_models.models.factor_methods import DAMPING, METHODS
from lspm_models.models.factorization_config import DEFAULTS, MatrixFactorizationConfig
from lspm_models.models.matrix_factorization import MatrixFactorization, Recommendation

EXPLICIT, IMPLICIT = ("sgd", "als", "nmf", "svd"), ("bpr", "implicit-als")
USERS, ITEMS = 60, 40


def interactions(count=1800, seed=0, users=USERS, items=ITEMS):
    """Two kinds of users, each of whom likes and mostly takes the items of its own kind; no pair twice."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(users * items, generator=generator)
    u, i = pairs // items, pairs % items
    likes = u % 2 == i % 2
    taken = likes | (torch.rand(len(pairs), generator=generator) < 0.25)
    u, i, likes = (t[taken][:count] for t in (u, i, likes))
    noise = 0.3 * torch.randn(len(u), generator=generator)
    ratings = (torch.where(likes, 4.2, 2.0) + noise).clamp(1, 5)
    return Interactions.from_arrays(
        [f"user{n}" for n in u.tolist()], [f"item{n}" for n in i.tolist()], ratings
    )


# A small table needs larger steps.
SETTINGS = {"sgd": {"lr": 0.05, "reg": 0.05, "lr_decay": 1.0, "std": 0.1}, "als": {"reg": 0.05}}


def small(method, **options):
    fewer = {"factors": 8, "epochs": min(DEFAULTS[method]["epochs"], 40)}
    return MatrixFactorizationConfig.of(method, **(fewer | SETTINGS.get(method, {}) | options))


def kind(name):
    return int(name.removeprefix("user").removeprefix("item")) % 2


@pytest.fixture(scope="module", params=METHODS)
def fitted(request):
    data = interactions()
    test = torch.arange(len(data)) % 5 == 0
    return MatrixFactorization(small(request.param)).fit(data.subset(~test)), data.subset(test)


def test_it_predicts_what_it_has_not_seen(fitted):
    model, test = fitted
    found = model.predict(test.users, test.items)
    if model.implicit:
        liked = test.ratings > 3
        assert found[liked].mean() > found[~liked].mean() + 0.1
    else:
        error = (found - test.ratings).square().mean().sqrt()
        # To singular vectors, what is not rated is as the mean and the biases have it.
        assert error < (0.95 if model.config.method == "svd" else 0.7) * test.ratings.std()
        assert found.min() >= model.interactions.scale[0]
        assert found.max() <= model.interactions.scale[1]


def test_it_recommends_what_is_liked_and_not_seen(fitted):
    model, _ = fitted
    users = [f"user{n}" for n in range(6)]
    seen = model.recommend(users, 40, filter_seen=False)
    for user, new, everything in zip(users, model.recommend(users, 3), seen, strict=True):
        assert len(new) == 3
        assert [r.score for r in new] == sorted((r.score for r in new), reverse=True)
        assert len({r.item for r in everything}) == ITEMS
        row = model.interactions.user_ids.place(user, -1)
        taken = model.interactions.items[model.interactions.users == row].tolist()
        names = {model.interactions.item_ids.names[i] for i in taken}
        assert not names & {r.item for r in new}
        liked = [r for r in everything if r.item not in names]
        assert [r.item for r in liked[:3]] == [r.item for r in new]
    firsts = [r for user, found in zip(users, seen, strict=True) for r in found[:8]]
    own = sum(kind(r.item) == kind(user) for user, found in zip(users, seen, strict=True) for r in found[:8])
    assert own > 0.9 * len(firsts)


def test_items_of_one_kind_are_alike(fitted):
    model, _ = fitted
    found = model.similar_items("item4", 8)
    assert all(isinstance(r, Recommendation) and r.title == r.item != "item4" for r in found)
    assert sum(kind(r.item) == 0 for r in found) >= 7
    assert all(-1.001 <= r.score <= 1.001 for r in found)


def test_an_explanation_adds_up(fitted):
    model, _ = fitted
    data = model.interactions
    everything = model.explain("user2", "item4", ITEMS)
    taken = data.items[data.users == data.user_ids.place("user2", -1)].tolist()
    assert {r.item for r in everything} == {data.item_ids.names[i] for i in taken}
    assert [r.score for r in everything] == sorted((r.score for r in everything), reverse=True)
    assert model.explain("user2", "item4", 2) == everything[:2]
    if model.implicit:
        assert kind(everything[0].item) == 0


def test_a_saved_model_is_the_same(fitted, tmp_path):
    model, test = fitted
    model.save(tmp_path / "model")
    again = MatrixFactorization.load(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again.predict(test.users, test.items), model.predict(test.users, test.items))
    assert again.recommend(["user1"], 4) == model.recommend(["user1"], 4)


def test_who_is_new_is_folded_in(fitted):
    """Someone of each kind who takes ten items; who was there before keeps what they had."""
    model, test = fitted
    before = model.predict(test.users, test.items)
    copy = MatrixFactorization(model.config)
    copy.interactions, copy.tables = model.interactions, model.tables
    rows = [(f"user{1000 + k}", f"item{2 * n + k}", 4.5) for k in (0, 1) for n in range(10)]
    rows += [(f"user{n}", "item1000", 4.5 if n % 2 == 0 else 1.5) for n in range(30)]
    copy.partial_fit(Interactions.from_arrays(*zip(*rows, strict=True)))
    assert torch.equal(copy.predict(test.users, test.items), before)
    for k in (0, 1):
        found = copy.recommend([f"user{1000 + k}"], 5)[0]
        assert sum(kind(r.item) == k for r in found) >= 4
    if not model.implicit:
        users = torch.tensor([copy.interactions.user_ids.place(f"user{n}", -1) for n in (40, 41)])
        item = copy.interactions.item_ids.place("item1000", -1)
        like, dislike = copy.predict(users, torch.tensor([item, item])).tolist()
        assert like > dislike + 0.5
    assert len(model.interactions.user_ids) == USERS


@pytest.mark.parametrize("method", METHODS)
def test_training_that_was_interrupted_goes_on_with_the_same_bits(method, tmp_path):
    data = interactions()
    config = small(method, epochs=5)
    whole = MatrixFactorization(config).fit(data)
    part = MatrixFactorization(config).fit(data, callback=lambda epoch, loss, seconds: epoch < 2)
    assert part.epochs_done == 2
    part.save(tmp_path / "model")
    rest = MatrixFactorization.load(tmp_path / "model").fit(data)
    for name, tensor in whole.tables.tensors().items():
        assert torch.equal(tensor, rest.tables.tensors()[name]), name


def test_fitting_again_begins_anew():
    data = interactions()
    model = MatrixFactorization(small("sgd", epochs=3)).fit(data)
    first = model.tables.user_factors.clone()
    assert torch.equal(model.fit(data).tables.user_factors, first)
    other = model.fit(interactions(seed=1)).tables.user_factors
    assert not torch.equal(other, first)


def test_the_losses_fall_and_the_callback_sees_them():
    losses = []
    data = interactions()
    MatrixFactorization(small("als")).fit(data, lambda epoch, loss, seconds: losses.append(loss))
    assert len(losses) == 15
    assert all(b <= a * 1.0001 for a, b in itertools.pairwise(losses))


def test_singular_vectors_are_those_of_the_centred_matrix():
    data = interactions()
    model = MatrixFactorization(small("svd", factors=3, epochs=12)).fit(data)
    t = model.tables
    dense = torch.zeros(USERS, ITEMS)
    dense[data.users, data.items] = data.ratings - t.mean - t.user_bias[data.users] - t.item_bias[data.items]
    u, s, v = torch.linalg.svd(dense.double())
    best = (u[:, :3] * s[:3]) @ v[:3]
    assert (t.user_factors @ t.item_factors.T - best).abs().max() < 1e-3


def test_strangers_get_what_is_known(fitted):
    """The mean and biases, or, where these are none, what users and items have on average."""
    model, test = fitted
    t, unknown = model.tables, torch.tensor([-1])
    average = [torch.zeros(1, f.shape[1]) for f in (t.user_factors, t.item_factors)]
    if model.config.method in UNBIASED:
        ratings = model.interactions
        counts = [torch.bincount(ids).double() for ids in (ratings.users, ratings.items)]
        weights = [n / (n + DAMPING) for n in counts]
        factors = t.user_factors.double(), t.item_factors.double()
        average = [(w @ f / w.sum())[None].float() for w, f in zip(weights, factors, strict=True)]
    lowest, highest = (-math.inf, math.inf) if model.implicit else model.interactions.scale
    expected = (t.mean + average[0] @ average[1].T).clamp(lowest, highest).item()
    assert model.predict(unknown, unknown).item() == pytest.approx(expected)
    scores = t.mean + t.item_bias + (average[0] @ t.item_factors.T)[0]
    items = test.items[:9]
    found = model.predict(unknown.expand(9), items)
    torch.testing.assert_close(found, scores[items].clamp(lowest, highest))
    best = [r.score for r in model.recommend(["nobody"], 3)[0]]
    assert best == pytest.approx(scores.topk(3).values.tolist())


def test_weights_count():
    """A rating of weight 3 is the rating given three times."""
    rows = [("a", "x", 5.0), ("a", "y", 1.0), ("b", "x", 4.0), ("b", "y", 2.0)]
    columns = list(zip(*rows, strict=True))
    weighted = Interactions.from_arrays(*columns, weights=[3.0, 1.0, 1.0, 1.0])
    repeated = Interactions.from_arrays(*zip(*([rows[0]] * 2 + rows), strict=True))
    config = small("als", factors=2, weighted_reg=0.0)
    found = [MatrixFactorization(config).fit(d) for d in (weighted, repeated)]
    pair = torch.tensor([0, 1]), torch.tensor([0, 1])
    torch.testing.assert_close(*(m.predict(*pair) for m in found))
    parts = [sum(r.score for r in m.explain("a", "x")) for m in found]
    assert parts[0] == pytest.approx(parts[1], rel=1e-4)


def test_weights_are_counts_to_implicit_feedback_and_left_out_by_ranking():
    users, items = ["a", "a", "b", "b"], ["x", "y", "x", "z"]
    counts = [9.0, 1.0, 2.0, 4.0]
    columns = {"ratings": (users, items, counts), "weights": (users, items, None, counts)}
    found = {}
    for method, (what, given) in itertools.product(METHODS, columns.items()):
        found[method, what] = MatrixFactorization(small(method, factors=2, epochs=3)).fit(
            Interactions.from_arrays(*given)
        )
    pair = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2])
    predicted = {key: model.predict(*pair) for key, model in found.items()}
    assert torch.equal(predicted["implicit-als", "ratings"], predicted["implicit-als", "weights"])
    explained = [found["implicit-als", what].explain("a", "z") for what in columns]
    assert explained[0] == explained[1]
    assert torch.equal(predicted["bpr", "ratings"], predicted["bpr", "weights"])
    weighted = Interactions.from_arrays(users, items, [5.0, 1, 4, 2], counts)
    model = MatrixFactorization(small("sgd", epochs=1)).fit(weighted)
    assert model.tables.mean == pytest.approx(
        sum(c * r for c, r in zip(counts, [5, 1, 4, 2], strict=True)) / 16
    )


def test_without_regularisation_the_shortest_solution_is_folded_in():
    model = MatrixFactorization(small("sgd", reg=0.0, epochs=10)).fit(interactions())
    model.partial_fit((["new", "new"], ["item1", "item2"], [4.5, 1.5]))
    user = model.interactions.user_ids.internal(["new"])
    items = model.interactions.item_ids.internal(["item1", "item2"])
    t = model.tables
    found = torch.cat((t.user_factors[user], t.user_bias[user][:, None]), 1)[0].double()
    rows = torch.cat((t.item_factors[items], torch.ones(2, 1)), 1).double()
    left = torch.tensor([4.5, 1.5], dtype=torch.float64) - t.mean - t.item_bias[items]
    assert torch.allclose(found, torch.linalg.pinv(rows) @ left, atol=1e-4)


def test_pairs_that_come_twice():
    """A log of plays is to implicit-als what their number is; to svd a matrix has the mean there."""
    u, i = torch.arange(40) % 8, torch.arange(40) % 5
    twice = (u.repeat(2), i.repeat(2))
    for method, one in (("implicit-als", torch.full((40,), 2.0)), ("svd", torch.arange(40) % 4 + 1.5)):
        other = torch.ones(80) if method == "implicit-als" else torch.cat((one - 0.5, one + 0.5))
        a = MatrixFactorization(small(method)).fit((u, i, one, torch.full((40,), 1.0 + (method == "svd"))))
        b = MatrixFactorization(small(method)).fit((*twice, other))
        a.partial_fit(([9, 9], [0, 1], [4.0, 2.0])), b.partial_fit(([9, 9], [0, 1], [4.0, 2.0]))
        assert torch.allclose(a.scores(torch.arange(9)), b.scores(torch.arange(9)), atol=1e-4)
        assert {r.item for r in b.explain(0, 1)} == {r.item for r in a.explain(0, 1)}
    for method in IMPLICIT:
        model = MatrixFactorization(small(method, epochs=2)).fit((u, i))
        model.partial_fit(([9, 9, 9], [2, 2, 2])), model.partial_fit(([10], [2], [3.0]))
        rows = model.tables.user_factors[model.interactions.user_ids.internal([9, 10])]
        assert torch.allclose(rows[0], rows[1]) and len(model.explain(9, 1)) == 1


def test_a_few_items_are_ranked_too():
    """As many as a Latin square has parts, so that every item would be alone in its part."""
    users, items = torch.arange(40).repeat_interleave(3), torch.tensor([0, 2, 4]).repeat(40)
    losses = []
    model = MatrixFactorization(small("bpr", factors=2))
    model.fit((users, items + users % 2), lambda epoch, loss, seconds: losses.append(loss))
    assert losses[-1] < 0.5 < losses[0]


def test_one_rating_is_enough():
    for method in METHODS:
        model = MatrixFactorization(small(method, epochs=2)).fit(
            Interactions.from_arrays(["a"], ["x"], [3.0])
        )
        assert model.recommend(["a"], 2) == [[]]
        assert len(model.recommend(["a"], 2, filter_seen=False)[0]) == 1
