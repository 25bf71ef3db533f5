"""Forwards that are remade from their source: which sources are believed, and what a function keeps."""

import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from acceleration.test_graphs_left_alone import ByGlobal, Net, is_traced
from acceleration.test_own_attention import NanoGPT, X, pair

import lspm_kernels as lk
from lspm_kernels.acceleration import attentions, own_calls, source
from lspm_kernels.acceleration.statements import Unproven
from lspm_kernels.acceleration.swap import is_swapped


def unlike_its_source(cls):
    """A forward whose file says something else."""
    forward = cls.forward
    code = forward.__code__
    constants = tuple(not c if c is True else c for c in code.co_consts)
    cls.forward = type(forward)(code.replace(co_consts=constants), forward.__globals__, "forward")
    return cls


class Edited(NanoGPT):
    def forward(self, x):
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class Watching(NanoGPT):
    def forward(self, x):
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v)
        return y if "y" in locals() else x


EXECUTED = {"F": F, "NanoGPT": NanoGPT}
exec(
    "class Executed(NanoGPT):\n    def forward(self, x):\n        q, k, v = self.heads(x)\n"
    "        return F.scaled_dot_product_attention(q, k, v)",
    EXECUTED,
)


class Hidden:
    """A decorator that does not show what it calls."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.functions = [function]

    def __get__(self, owner, cls):
        return self if owner is None else functools.partial(self.functions[0], owner)


class Decorated(NanoGPT):
    forward = Hidden(NanoGPT.forward)


@pytest.mark.parametrize(
    "make", [lambda: unlike_its_source(Edited), lambda: Watching, lambda: EXECUTED["Executed"]]
)
def test_a_forward_that_is_not_its_source_is_left_alone(make):
    cls = make()
    with pytest.raises(Unproven):
        source.tree_of(cls.forward)
    net = cls()
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    assert not is_swapped(net)
    torch.testing.assert_close(net(X), plain(X))


def test_a_forward_that_is_not_its_source_is_not_traced():
    code = ByGlobal.forward.__code__.replace(co_firstlineno=Net.forward.__code__.co_firstlineno)

    class OtherNet(Net):
        forward = type(Net.forward)(code, ByGlobal.forward.__globals__, "forward")

    assert inspect.getsource(OtherNet.forward) == inspect.getsource(Net.forward)
    net, other = Net().eval(), OtherNet().eval()
    lk.accelerate(net)
    lk.accelerate(other)
    assert is_traced(net) and not is_traced(other)


def test_a_decorator_that_hides_its_function_is_left_alone():
    net = Decorated()
    lk.accelerate(net)
    assert not is_swapped(net)


class Private(NanoGPT):
    """Names that a class changes, a closure, super(), and a default that is made where it stands."""

    def __init__(self):
        super().__init__()
        self.__scale = 0.5

    def forward(self, x, *, options=dict(scale=2.0), **kwargs):  # noqa: B006
        q, k, v = super().heads(x)
        """A sentence
        on two lines."""
        y = F.scaled_dot_product_attention(q, k, v) * options["scale"]
        return sum(y.transpose(1, 2).reshape(x.shape) for _ in range(2))


def test_closures_and_defaults_are_those_of_the_function(monkeypatch):
    net, plain = pair(Private)
    called, attend = [], attentions.scaled_dot_product_attention
    record = lambda *args, **kwargs: (called.append(1), attend(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(attentions, "scaled_dot_product_attention", record)
    torch.testing.assert_close(net(X), plain(X))
    torch.testing.assert_close(net(X, options={"scale": 3.0}, other=1), plain(X, options={"scale": 3.0}))
    assert len(called) == 2
    made = own_calls._remade(Private.forward, frozenset())
    assert made.__kwdefaults__ is Private.forward.__kwdefaults__
    assert made.__code__.co_firstlineno == Private.forward.__code__.co_firstlineno
    assert made.__code__.co_qualname == Private.forward.__code__.co_qualname
    net.n_head = 5
    with pytest.raises(RuntimeError) as error:
        net(X)
    frames = [(entry.name, str(entry.path)) for entry in error.traceback]
    assert ("forward", __file__) in frames
