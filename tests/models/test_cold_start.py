"""Who has no rating is as those with like features are, and strangers are as anybody."""

import math
from dataclasses import replace

import pytest
import torch
from models.test_matrix_factorization import ITEMS, USERS, interactions, small

from lspm_models.data.interactions import Categories, Features, Ids
from lspm_models.models.cold_start import DAMPING, RIDGE, described, filled
from lspm_models.models.factor_methods import METHODS, Tables
from lspm_models.models.matrix_factorization import MatrixFactorization

MORE = 6  # users and items that nobody rated


def kinds(ids):
    labels = [("even", "odd")[int(name[4:]) % 2] for name in ids.names]
    return Features({"kind": Categories.of([[label] for label in labels])})


def with_the_unrated(features=True):
    """The ratings of two kinds, with users and items behind them of whom only the kind is known."""
    data = interactions()
    users, items = (Ids(ids.names) for ids in (data.user_ids, data.item_ids))
    for n in range(MORE):
        users.add(f"user{USERS + n}"), items.add(f"item{ITEMS + n}")
    found = replace(data, user_ids=users, item_ids=items)
    return replace(found, user_features=kinds(users), item_features=kinds(items)) if features else found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["user", "item"])
def test_features_say_what_ratings_do_not(method, side, tmp_path):
    data = with_the_unrated()
    model = MatrixFactorization(small(method)).fit(data)
    new, old = torch.arange(MORE) + {"user": USERS, "item": ITEMS}[side], torch.arange(20)
    pairs = torch.cartesian_prod(*((new, old) if side == "user" else (old, new))).unbind(1)
    found = model.predict(*pairs)
    names = [[data.user_ids.names[u], data.item_ids.names[i]] for u, i in torch.stack(pairs, 1).tolist()]
    alike = torch.tensor([int(user[4:]) % 2 == int(item[4:]) % 2 for user, item in names])
    assert found[alike].mean() > found[~alike].mean() + (0.2 if model.implicit else 0.5)
    model.save(tmp_path)
    assert torch.equal(MatrixFactorization.load(tmp_path).predict(*pairs), found)
    if side == "user":
        items = [int(r.item[4:]) % 2 for r in model.recommend([f"user{USERS}"], 8)[0]]
        assert items.count(USERS % 2) >= 7
    # Who has ratings keeps what these taught.
    bare = MatrixFactorization(small(method)).fit(with_the_unrated(features=False))
    known = data.users[:50], data.items[:50]
    torch.testing.assert_close(bare.predict(*known), model.predict(*known))


@pytest.mark.parametrize("method", METHODS)
def test_without_features_they_are_as_strangers(method):
    model = MatrixFactorization(small(method)).fit(with_the_unrated(features=False))
    items = torch.arange(ITEMS)
    found = model.predict(torch.full((ITEMS,), USERS), items)
    assert torch.equal(found, model.predict(torch.full((ITEMS,), -1), items))
    assert found.std() > 0.005  # not one score for all
    if method == "nmf":  # which has no mean to fall back on
        assert 2.6 < found.mean() < 3.6  # half of the items are worth 4.2 to anybody, half 2


@pytest.mark.parametrize("method", METHODS)
def test_who_comes_new_brings_features(method):
    data = interactions()
    data = replace(data, user_features=kinds(data.user_ids), item_features=kinds(data.item_ids))
    model = MatrixFactorization(small(method)).fit(data)
    more = with_the_unrated()
    model.partial_fit(replace(more.subset(torch.arange(3)), user_features=more.user_features))
    assert model.interactions.user_features.categories["kind"].labels(USERS + 1) == ["odd"]
    for user in (USERS, USERS + 1):
        items = [int(r.item[4:]) % 2 for r in model.recommend([f"user{user}"], 8)[0]]
        assert items.count(user % 2) >= 7


@pytest.mark.parametrize("method", ["nmf", "implicit-als"])
def test_two_strangers_to_each_other(method):
    """Folding a user in with nothing but a new item gives zeros, which would be the worst rating of all."""
    model = MatrixFactorization(small(method)).fit(interactions())
    model.partial_fit((["user1000"], ["item1000"], [5.0]))
    pair = torch.tensor([USERS, USERS, -1]), torch.tensor([ITEMS, 3, 3])
    found = model.predict(*pair)
    assert found[0] > model.interactions.scale[0] if method == "nmf" else found[0] > 0.2
    assert found[1] == found[2]


def test_factors_that_are_not_negative_stay_so():
    data = with_the_unrated(features=False)
    odd = torch.tensor([int(name[4:]) % 2 for name in data.user_ids.names], dtype=torch.float32)
    sizes, far = (USERS + MORE, ITEMS + MORE), odd.clone()
    far[USERS : USERS + 2] = torch.tensor([-10.0, 10.0])
    data = replace(data, user_features=Features({}, {"far": far}))
    tables = Tables(odd[:, None], torch.ones(sizes[1], 1), *map(torch.zeros, sizes))
    tables.user_factors[:USERS] += 0.01  # zeros would be as if nobody had rated
    found = {method: filled(tables, data, method).user_factors[USERS] for method in ("als", "nmf")}
    assert found["als"] < -0.5
    assert found["nmf"] == 0


def test_it_is_ridge_regression_on_numbers_and_shares():
    features = Features(
        {"genre": Categories.of([["a"], ["a", "b"], [], ["b"], ["a"]])},
        {"year": torch.tensor([1.0, 3.0, math.nan, 5.0, 9.0])},
    )
    x = described(features, 5)
    shares = torch.tensor([[1, 0], [0.5, 0.5], [0.625, 0.375], [0, 1], [1, 0]]).double()
    torch.testing.assert_close(x[:, :2], shares - torch.tensor([0.625, 0.375]).double())
    years = torch.tensor([-3.5, -1.5, 0, 0.5, 4.5]).double()
    torch.testing.assert_close(x[:, 2], years / math.sqrt(35 / 4))
    assert described(Features({}, {"same": torch.ones(3)}), 3).tolist() == [[0], [0], [0]]

    data = interactions(12, users=5, items=4)
    data = replace(data, users=torch.arange(12) % 3, user_ids=Ids(range(5)), user_features=features)
    tables = Tables(torch.randn(5, 3), torch.randn(4, 3), torch.randn(5), torch.randn(4), 3.0)
    found = filled(tables, data, "als")
    # Least squares with an intercept, and rows of zeros that hold the slopes back.
    root = (torch.tensor([4 / (4 + DAMPING)]).double() ** 0.5).expand(3)[:, None]
    left = torch.cat((torch.ones(3, 1), x[:3]), 1).double() * root
    held = torch.cat((torch.zeros(3, 1), math.sqrt(RIDGE) * torch.eye(3)), 1).double()
    targets = torch.cat((tables.user_factors, tables.user_bias[:, None]), 1).double()
    right = torch.cat((targets[:3] * root, torch.zeros(3, 4).double()))
    slopes = torch.linalg.lstsq(torch.cat((left, held)), right).solution
    expected = (slopes[0] + x[3:] @ slopes[1:]).float()
    torch.testing.assert_close(found.user_factors[3:5], expected[:, :3])
    torch.testing.assert_close(found.user_bias[3:5], expected[:, 3])
    assert torch.equal(found.user_factors[:3], tables.user_factors[:3])
    assert torch.equal(found.item_factors[:4], tables.item_factors)
    assert not found.user_factors[5].any() and not found.user_bias[5]
