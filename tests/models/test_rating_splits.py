"""Splits: nothing is lost, nothing stands on both sides, and time does not run backwards."""

import numpy as np
import pytest
import torch
from tiny_ratings import interactions

from lspm_models.data.interactions import Interactions
from lspm_models.data.rating_splits import by_time, k_fold, leave_last_out, split


def rows(found):
    return sorted(zip(found.users.tolist(), found.items.tolist(), found.timestamps.tolist(), strict=True))


def test_the_folds_are_those_of_surprise():
    """A shuffle by NumPy's old generator, cut so that the first parts have one more."""
    found = interactions().subset(torch.arange(598))
    order = list(range(598))
    np.random.RandomState(3).shuffle(order)
    first, tests = 0, []
    for fold, (training, test) in enumerate(k_fold(found, 5, seed=3)):
        size = 598 // 5 + (fold < 598 % 5)
        expected = found.subset(torch.tensor(order[first : first + size]))
        assert torch.equal(test.timestamps, expected.timestamps)
        assert sorted(rows(training) + rows(test)) == rows(found)
        first, tests = first + size, tests + rows(test)
    assert sorted(tests) == rows(found)
    assert rows(next(iter(k_fold(found, 5, seed=4)))[1]) != rows(next(iter(k_fold(found, 5, seed=3)))[1])
    assert rows(split(found, "random", folds=5, fold=4, seed=3)[1]) == rows(test)


def test_the_folds_against_surprise_itself():
    surprise = pytest.importorskip("surprise")
    pandas = pytest.importorskip("pandas")
    found = interactions()
    frame = pandas.DataFrame({"u": found.users, "i": found.items, "r": found.ratings})
    data = surprise.Dataset.load_from_df(frame, surprise.Reader(rating_scale=(1, 5)))
    theirs = surprise.model_selection.KFold(4, random_state=1).split(data)
    for (_, test), (_, expected) in zip(k_fold(found, 4, seed=1), theirs, strict=True):
        ours = zip(test.users.tolist(), test.items.tolist(), test.ratings.tolist(), strict=True)
        assert list(ours) == [(int(u), int(i), r) for u, i, r in expected]


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_of_every_user_are_set_aside(count):
    found = interactions()
    training, test = leave_last_out(found, count)
    assert sorted(rows(training) + rows(test)) == rows(found)
    assert torch.bincount(test.users).tolist() == [count] * 40
    for user in range(40):
        assert test.timestamps[test.users == user].min() > training.timestamps[training.users == user].max()


def test_of_equal_times_the_later_in_the_data_is_the_last_and_who_has_one_keeps_it():
    found = Interactions.from_arrays([1, 1, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4], timestamps=[5, 9, 9, 9])
    training, test = leave_last_out(found)
    assert (test.items.tolist(), training.items.tolist()) == ([3], [0, 1, 2])


def test_the_latest_share_is_set_aside():
    found = interactions()
    for training, test in (by_time(found, 0.25), split(found, "time", folds=4)):
        assert (len(training), len(test)) == (450, 150)
        assert training.timestamps.max() < test.timestamps.min()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: split(x, "odd"), "kind must be one of random, last, time, got 'odd'"),
        (lambda x: split(x, "random", fold=5), "fold must be 0 to 4, got 5"),
        (lambda x: next(k_fold(x, 1)), "folds must be 2 to the number of ratings, 4, got 1"),
        (lambda x: next(k_fold(x, 5)), "folds must be 2 to the number of ratings, 4, got 5"),
        (leave_last_out, "ratings must have timestamps to be split by time, got none"),
        (lambda x: leave_last_out(x, 0), "count must be at least 1, got 0"),
        (lambda x: by_time(x, 0.01), "share must leave ratings on both sides of 4, got 0.01"),
    ],
)
def test_what_cannot_be_split(make, message):
    with pytest.raises(ValueError) as error:
        make(Interactions.from_arrays([1, 1, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4]))
    assert str(error.value) == f"split: {message}"


def test_users_of_one_rating_each_leave_nothing_to_set_aside():
    found = Interactions.from_arrays([1, 2], [1, 1], [1, 2], timestamps=[1, 2])
    with pytest.raises(
        ValueError, match=r"^split: a user must have more than 1 ratings, got none with as many$"
    ):
        leave_last_out(found)
