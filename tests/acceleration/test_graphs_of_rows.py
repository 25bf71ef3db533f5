"""accelerate on feed-forward networks: linear layers and what is between them become one call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration import graphs, row_chains
from lspm_kernels.acceleration.swap import is_swapped

C, H = 64, 96


class Transposed(nn.Module):
    """GPT-2's linear layer: its weight is (in, out)."""

    def __init__(self, ins, outs):
        super().__init__()
        generator = torch.Generator().manual_seed(ins)
        self.weight = nn.Parameter(torch.randn(ins, outs, generator=generator) / ins**0.5)
        self.bias = nn.Parameter(torch.randn(outs, generator=generator))
        self.outs = outs

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.outs)


class Tanh(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


class GPT2(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = Transposed(C, H), Transposed(H, C)
        self.act, self.dropout = Tanh(), nn.Dropout(0.0)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.proj = nn.Linear(C, H, bias=False), nn.Linear(H, C, bias=False)
        self.norm = nn.Identity()

    def forward(self, x):
        return self.proj(self.norm(F.gelu(self.fc(x), approximate="tanh")))


class T5(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(C, H), nn.Linear(H, C)
        self.dropout, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x):
        return self.wo(self.dropout(self.act(self.wi(x))))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((C, H), (C, H), (H, C)))
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Gated(Llama):
    def forward(self, x):
        return self.down(torch.mul(self.up(x), F.gelu(self.gate(x))))


NETS = {
    GPT2: "mlp of gelu_tanh",
    NanoGPT: "mlp of gelu_tanh",
    T5: "mlp of relu",
    Llama: "gated_mlp of silu",
    Gated: "gated_mlp of gelu",
}
X = torch.randn(3, 128, C, generator=torch.Generator().manual_seed(0))


def pair(cls, **options):
    torch.manual_seed(0)
    net = cls()
    plain = copy.deepcopy(net)
    assert lk.accelerate(net, **options).replaced[""] == NETS[cls]
    assert is_swapped(net) and type(net).lspm_faster is graphs.Traced
    return net, plain


@pytest.fixture
def taken(monkeypatch):
    """Whether the kernel took each call."""
    found, takes = [], row_chains.Chain._taken

    def record(self, x):
        parameters = takes(self, x)
        found.append(parameters is not None)
        return parameters

    monkeypatch.setattr(row_chains.Chain, "_taken", record)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", NETS)
def test_feed_forward_networks_are_one_call(cls, dtype, taken):
    if cls is T5 and dtype is torch.bfloat16:
        pytest.skip("a relu's gradient jumps: how a number near 0 is rounded decides, in eager as in ours")
    net, plain = (each.eval().to(dtype) for each in pair(cls))
    names = [name for name, _ in net.named_parameters()]

    def call(module):
        return lambda x, *parameters: functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    for mode in (False, cls is not T5):
        net.train(mode)
        oracle.check(call(net), call(plain), [X.to(dtype), *net.parameters()])
    assert taken == [True, True]


@pytest.mark.parametrize("cls", [GPT2, Llama])
def test_autocast_is_as_torchs(cls, taken):
    net, plain = pair(cls)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(X), plain(X)
    assert y.dtype == expected.dtype == torch.bfloat16
    oracle.compare("y", y, plain.double()(X.double()), expected)
    assert taken == [True]


def test_dropout_between_the_layers_is_kept(taken):
    net, plain = pair(T5, deny=nn.Dropout)  # whose random numbers would be others than torch's
    for mode in (True, False):
        torch.manual_seed(1)
        y = net.train(mode)(X)
        torch.manual_seed(1)
        torch.testing.assert_close(y, plain.train(mode)(X))
    assert taken == [False, True]


class Adapter(nn.Module):
    """LoRA's way to replace a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(C, 4), nn.Linear(4, H)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapter(net):
    torch.manual_seed(3)
    net.wi = Adapter(net.wi)


def a_hook(net):
    net.wo.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def another_activation(net):
    net.act = nn.Tanh()


def a_shared_layer(net):
    net.wi.weight = net.wo.weight = nn.Parameter(torch.eye(C))
    net.wi.bias = None
    net.wo.bias = None


def no_bias(net):
    net.wi.bias = None


@pytest.mark.parametrize("change", [adapter, a_hook, another_activation, a_shared_layer, no_bias])
def test_changes_are_followed(change):
    net, plain = (each.eval() for each in pair(T5))
    torch.testing.assert_close(net(X), plain(X))
    for each in (net, plain):
        change(each)
    torch.testing.assert_close(net(X), plain(X))


def test_a_bias_that_was_none_is_added():
    net = nn.Sequential(nn.Linear(C, H, bias=False), nn.GELU(), nn.Linear(H, C))
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    torch.testing.assert_close(net(X), plain(X))
    net[0].bias = plain[0].bias = nn.Parameter(torch.ones(H))
    torch.testing.assert_close(net(X), plain(X))


def test_an_option_of_the_activation_is_followed():
    net = nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Linear(H, C))
    plain = copy.deepcopy(net)
    lk.accelerate(net, deny="1")
    torch.testing.assert_close(net(X), plain(X))
    for each in (net, plain):
        each[1].approximate = "tanh"
    oracle.compare("y", net(X), plain.double()(X.double()), plain.float()(X))


def test_what_the_kernel_does_not_take_goes_the_way_it_went(taken):
    net, plain = pair(Llama)
    for x in (X[0, 0], X[:0], X[:, :2], X.double(), torch.func.vmap(lambda x: x * 2)(X[:, :2])):
        for each in (net, plain):
            each.to(x.dtype)
        torch.testing.assert_close(net(x), plain(x))
    batched = X[:, None].float()
    for each in (net, plain):
        each.float()
    torch.testing.assert_close(torch.func.vmap(net)(batched), torch.func.vmap(plain)(batched))
    assert not any(taken)
