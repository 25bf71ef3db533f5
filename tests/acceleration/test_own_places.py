"""Where a forward has a sum and the norm of it, and where something stands between them."""

import pytest

from lspm_kernels.acceleration import source
from lspm_kernels.acceleration.places import Places


def effect_between(self, x, y):
    h = x + y
    h.add_(1)
    return self.norm(h)


def something_first(self, x, y):
    h = x + y
    return self.other(x) + self.norm(h)


def rebound(self, x, y):
    h = x + y
    h = x
    return self.norm(h)


def in_place(self, x, y):
    x += y
    return self.norm(x)


def by_value(self, x, y):
    h = x + y
    if x.shape[0] > y:
        h = y
    return self.norm(h)


def copy_is_asked(self, x, y):
    h = x + y
    y = h
    if y is None:
        h = x
    return self.norm(h)


def otherwise(self, x, y):
    h = x + y
    if y is None:
        h = x
    else:
        h = y
    return self.norm(h)


def with_an_option(self, x, y):
    h = x + y
    return self.norm(h, y)


def sometimes(self, x, y):
    h = x + y
    return self.norm(h) if y is None else h


def of_another(self, x, y):
    h = x + y
    return x.norm(h)


def another_self(self, x, y):
    self = y
    return self.norm(x + y)


def within(self, x, y):
    return [self.norm(x + z) for z in y]


ALONE = [
    effect_between, something_first, rebound, in_place, by_value, copy_is_asked, otherwise, with_an_option,
    sometimes, of_another, another_self, within,
]  # fmt: skip


def at_once(self, x, y):
    return self.norm(x + y)


def behind_copies(self, x, y):
    h = x + self.other(y)
    z = h
    if y is not None:
        h = y
    y = z
    y = x + self.deep.norm(h)
    return y


def in_blocks(self, x, y):
    for _ in range(3):
        with self.context:
            x = x + y
            x = self.other(self.norm(x), y)
    return x


def twice(self, x, y):
    x = x + y
    x = x + self.first(x)
    return self.second(x)


TOGETHER = {
    at_once: [("norm",)],
    behind_copies: [("deep", "norm")],
    in_blocks: [("norm",)],
    twice: [("first",), ("second",)],
}


@pytest.mark.parametrize("function", TOGETHER)
def test_where_nothing_stands_between_they_are_one(function):
    places = Places(function, source.tree_of(function))
    places.change()
    assert sorted(places.norms) == TOGETHER[function]


@pytest.mark.parametrize("function", ALONE)
def test_where_something_stands_between_they_are_two(function):
    places = Places(function, source.tree_of(function))
    places.change()
    assert not places.norms
