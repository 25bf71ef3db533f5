"""Residual sums and the norms of them in a module's own forward: one call where nothing stands between."""

import copy
import functools

import pytest
import torch
from acceleration.test_accelerate import ScaledNorm
from acceleration.test_lookalikes import Centred, Shifted
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration import own_calls, sums
from lspm_kernels.acceleration.swap import is_swapped

C = 64
X = torch.randn(3, 128, C, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.norm, self.other = nn.Linear(C, C), norm(C), nn.LayerNorm(C)
        self.dropout, self.extra = nn.Dropout(0.5), nn.Linear(C, C)
        for p in (*self.norm.parameters(), *self.other.parameters()):
            nn.init.normal_(p, 1.0, 0.3)


class After(Base):
    """BERT's."""

    def forward(self, x, y=None):
        x_ = self.dropout(self.dense(x))
        return self.norm(x_ + (x if y is None else y))


class Before(Base):
    """nanoGPT's."""

    def forward(self, x):
        x = x + self.dense(self.other(x))
        x = x + self.dense(self.norm(x))
        x = x + self.extra(self.other(x))
        return x


def decorated(function):
    @functools.wraps(function)
    def wrapped(*args, scale=1.0, **kwargs):
        return function(*args, **kwargs) * scale

    return wrapped


class Copied(Base):
    """Llama's, behind a decorator."""

    @decorated
    def forward(self, x, **kwargs):
        residual = x
        x = self.dense(x)
        x = residual + x
        residual = x
        x = self.norm(x)
        x = self.dense(x)
        x = residual + x
        return x


class Asked(Base):
    """GPT-2's."""

    def forward(self, x, more=None):
        residual = x
        x = self.dense(x) + residual
        if more is not None:
            residual = x
            x = self.other(x)
            x = residual + self.extra(x) * more
        residual = x
        x = self.norm(x)
        return residual + self.dense(x)


NETS = {
    After: "add_layer_norm",
    Before: "add_layer_norm",
    Copied: "add_layer_norm",
    Asked: "add_layer_norm",
    functools.partial(Copied, ScaledNorm): "add_rms_norm",
    functools.partial(After, Shifted): "add_rms_norm",
    functools.partial(Before, Centred): "add_layer_norm",
    functools.partial(After, nn.RMSNorm): "add_rms_norm",
}


@pytest.fixture
def taken(monkeypatch):
    """How often the kernel took a sum and its norm."""
    found = []
    for name in ("add_layer_norm", "add_rms_norm"):
        op = getattr(sums.layer_norm, name)
        record = lambda *args, op=op, name=name: (found.append(name), op(*args))[1]  # noqa: E731
        monkeypatch.setattr(sums.layer_norm, name, record)
    return found


def pair(make):
    net = make()
    plain = copy.deepcopy(net)
    report = lk.accelerate(net, deny=nn.Dropout)  # whose random numbers would be others than torch's
    assert report.replaced[""] == f"its own forward with {NETS.get(make, 'add_layer_norm')}"
    assert type(net).lspm_faster is own_calls.Remade
    return net, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", NETS, ids=lambda make: str(getattr(make, "args", make)))
def test_a_sum_and_its_norm_are_one_call(make, dtype, taken):
    net, plain = (each.eval().to(dtype) for each in pair(make))
    names = [name for name, _ in net.named_parameters()]

    def call(module):
        return lambda x, *parameters: functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    for training in (False, make is not After):
        net.train(training).dropout.eval()
        oracle.check(call(net), call(plain), [X.to(dtype), *net.parameters()])
    with torch.no_grad():
        oracle.check(net, lambda x: copy.deepcopy(plain).to(x.dtype)(x), [X.to(dtype)], gradients=False)
    assert len(taken) == (6 if getattr(make, "func", make) is Before else 3)
    assert NETS[make] in taken
    lk.restore(net)
    assert torch.equal(net.eval()(X.to(dtype)), plain(X.to(dtype)))


def test_dropout_before_a_sum_stays_torchs(taken):
    net, plain = pair(After)
    for each in (net, plain):
        torch.manual_seed(1)
        each.y = each.train()(X)
    torch.testing.assert_close(net.y, plain.y)
    assert len(taken) == 1


def test_what_stands_between_decides_at_every_call(taken):
    net, plain = pair(Asked)
    for more in (None, 2.0, None):
        torch.testing.assert_close(net(X, more=more), plain(X, more=more))
    assert len(taken) == 2
    with pytest.raises(TypeError, match="unknown"):
        net(X, unknown=1)
    net, plain = pair(Copied)
    torch.testing.assert_close(net(X, scale=3.0), plain(X, scale=3.0))
    assert len(taken) == 3


def a_hook(net):
    net.norm.register_forward_hook(lambda module, args, y: y * args[0])


def a_pre_hook(net):
    net.norm.register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def a_forward(net):
    net.norm.forward = lambda x: x + 1


def another_eps(net):
    net.norm.eps = 0.5


def another_norm(net):
    net.norm = nn.Sequential(nn.Linear(C, C), nn.Tanh())
    nn.init.eye_(net.norm[0].weight)
    nn.init.zeros_(net.norm[0].bias)


def no_norm(net):
    del net.norm
    net.norm = torch.tanh


def no_bias(net):
    net.norm.bias = None


def parametrized(net):
    parametrizations.weight_norm(net.norm, "weight", dim=None)


def in_half(net):
    net.norm.bfloat16()
    net.norm.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    net.norm.register_forward_hook(lambda module, args, y: y.float())


def in_double(net):
    net.norm.double()
    net.norm.weight.data = net.norm.weight.data.float()
    net.norm.bias.data = net.norm.bias.data.float()


CHANGES = [
    a_hook, a_pre_hook, a_forward, another_eps, another_norm, no_norm, no_bias, parametrized, in_half,
    in_double,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [After, Copied])
def test_changes_of_the_norm_are_followed(cls, change):
    net, plain = (each.eval() for each in pair(cls))
    torch.testing.assert_close(net(X), plain(X))
    for each in (net, plain):
        change(each)
    torch.testing.assert_close(net(X), plain(X))


class Optional(ScaledNorm):
    def __init__(self, features):
        super().__init__(features)
        self.shifted = False

    def forward(self, hidden):
        return super().forward(hidden) + 1 if self.shifted else super().forward(hidden)


def test_an_option_of_the_norm_is_followed(taken):
    net = Copied(Optional)
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    for shifted in (False, True, False):
        net.norm.shifted = plain.norm.shifted = shifted
        torch.testing.assert_close(net(X), plain(X))
    assert len(taken) == 2


def test_other_calls_are_computed_as_before(taken):
    net, plain = (each.eval() for each in pair(After))
    torch.testing.assert_close(net(X, X[:1]), plain(X, X[:1]))
    for x in (X[:1, :3], X[:0], X.double(), X.transpose(0, 1).half()):
        for each in (net, plain):
            each.to(x.dtype)
        torch.testing.assert_close(net(x), plain(x))
    for each in (net, plain):
        each.float()
    torch.testing.assert_close(torch.func.vmap(net)(X[:, None]), torch.func.vmap(plain)(X[:, None]))
    assert not taken
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(X), plain(X)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_a_hook_of_all_modules_sees_the_norm():
    net, seen = pair(Copied)[0], []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    net(X)
    handle.remove()
    assert net.norm in seen


def test_it_compiles_and_is_checkpointed():
    net, plain = (each.eval() for each in pair(Copied))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(X), plain(X))
    grads = []
    for each in (net, plain):
        x = X.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_the_module_may_be_denied():
    net = Copied()
    lk.accelerate(net, allow=nn.Linear)
    assert not is_swapped(net)
