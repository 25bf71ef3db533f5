"""torch's attention, called in a module's own forward, on its own or in a chain that torch.fx finds."""

import copy
import functools
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration import attentions, graphs, own_calls
from lspm_kernels.acceleration.swap import is_swapped

B, T, C, H = 2, 192, 64, 4
X = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.n_head, self.n_embd, self.dropout = H, C, 0.0

    def heads(self, x):
        for y in self.c_attn(x).split(self.n_embd, dim=2):
            yield y.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.heads(x)
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        return self.c_proj(y.transpose(1, 2).contiguous().view(x.shape))


class Timm(NanoGPT):
    """timm's, which torch.fx can follow."""

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        qkv = self.c_attn(x).reshape(B, N, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=0.0)
        return self.c_proj(x.transpose(1, 2).reshape(B, N, C))


class Grouped(NanoGPT):
    def forward(self, x, scale=0.2):
        q, k, v = self.heads(x)
        y = attend(q, k[:, :2], v[:, 1:3], scale=scale, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class WithMLP(NanoGPT):
    """What torch.fx finds a chain in."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(C, C), nn.GELU(), nn.Linear(C, C)

    def forward(self, x):
        q = self.c_attn(x).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q[0], q[1], q[2], is_causal=True)
        return self.down(self.act(self.up(y.transpose(1, 2).reshape(B, T, C))))


NETS = NanoGPT, Timm, Grouped, WithMLP


@pytest.fixture
def taken(monkeypatch):
    """Whether the kernel took each call."""
    found, takes = [], attentions._takes
    record = lambda *args, **kwargs: (found.append(takes(*args, **kwargs)), found[-1])[1]  # noqa: E731
    monkeypatch.setattr(attentions, "_takes", record)
    return found


def pair(cls):
    net = cls()
    plain = copy.deepcopy(net)
    report = lk.accelerate(net)
    assert "scaled_dot_product_attention" in report.replaced[""]
    assert type(net).lspm_faster is (graphs.Traced if cls is WithMLP else own_calls.Remade)
    return net, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", NETS)
def test_attention_is_ours(cls, dtype, taken):
    net, plain = (each.to(dtype) for each in pair(cls))
    names = [name for name, _ in net.named_parameters()]

    def call(module):
        return lambda x, *parameters: functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    for mode in (True, False):
        net.train(mode)
        oracle.check(call(net), call(plain.train(mode)), [X.to(dtype), *net.parameters()])
    assert taken == [True, True]
    lk.restore(net)
    assert torch.equal(net(X.to(dtype)), plain(X.to(dtype)))
    assert len(taken) == 2


Q, K, V = torch.randn(3, B, H, T, 32, generator=torch.Generator().manual_seed(1)).unbind(0)
MASK = torch.rand(T, T, generator=torch.Generator().manual_seed(2)) < 0.7
CALLS = {
    "a bool mask": ((MASK,), {}),
    "a mask without keys": ((MASK & (torch.arange(T) > 9)[:, None],), {}),
    "a mask of numbers": ((), {"attn_mask": torch.where(MASK, 0.5, -math.inf)[None, None]}),
    "a mask of sequences": ((MASK[None, None].expand(B, 1, T, T),), {"scale": 0.3}),
    "causal": ((None, 0.0, True), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_arguments_mean_what_they_mean_to_torch(name, dtype, taken):
    args, kwargs = CALLS[name]

    def call(function):
        def run(q, k, v):
            cast = [a.to(q) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
            named = {k: a.to(q) if torch.is_tensor(a) else a for k, a in kwargs.items()}
            return function(q, k, v, *cast, **named)

        return run

    ours = functools.partial(attentions.attend, F.scaled_dot_product_attention)
    given = [x.to(dtype) for x in (Q, K, V)]
    oracle.check(call(ours), call(F.scaled_dot_product_attention), given)
    assert taken == [True]
    y, expected = (
        call(f)(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in given)) for f in (ours, attend)
    )
    assert y.stride() == expected.stride()


def test_a_mask_has_its_gradient(taken):
    ours, plain = (torch.zeros(T, T, requires_grad=True) for _ in range(2))
    attentions.attend(attend, Q, K, V, ours).sum(-1).square().sum().backward()
    attend(Q, K, V, plain).sum(-1).square().sum().backward()
    assert taken == [True]
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_dropout_drops_its_share(taken):
    y = attentions.attend(attend, Q, K, torch.ones_like(V), dropout_p=0.25)
    assert taken == [True]
    assert abs(y.mean().item() - 1) < 0.02
    assert y.std() > 0.01


OTHERS = {
    "few": (Q[:, :, :4], K[:, :, :4], V[:, :, :4]),
    "three dimensions": (Q[0], K[0], V[0]),
    "float64": (Q.double(), K.double(), V.double()),
    "one head of keys for all": (Q, K[:, :1], V[:, :1]),
    "no keys": (Q, K[:, :, :0], V[:, :, :0]),
    "wide heads": tuple(x.repeat(1, 1, 1, 9) for x in (Q, K, V)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_torchs(name, taken):
    assert torch.equal(attentions.attend(attend, *OTHERS[name]), attend(*OTHERS[name]))
    assert not any(taken)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((Q, K, V, MASK), {"is_causal": True}),
        ((Q, K, V, MASK[:5]), {}),
        ((Q, K, V), {"dropout_p": 1.5}),
        ((Q, K.bfloat16(), V), {}),
        ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
    ],
)
def test_errors_are_torchs(args, kwargs):
    with pytest.raises((RuntimeError, ValueError)) as expected:
        attend(*args, **kwargs)
    with pytest.raises(type(expected.value)) as found:
        attentions.attend(attend, *args, **kwargs)
    assert str(found.value) == str(expected.value)


def test_a_choice_of_torchs_kernels_is_kept(taken):
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attentions.attend(attend, Q, K, V), attend(Q, K, V))
    with torch.autocast("cpu", torch.bfloat16):
        y = attentions.attend(attend, Q, K, V)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, attend(Q, K, V))
    assert not any(taken)


def test_what_stands_for_the_function_later_is_called(monkeypatch, taken):
    net, plain = pair(NanoGPT)
    net(X)
    assert taken == [True]
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kwargs: v)
    torch.testing.assert_close(net(X), plain(X))
    monkeypatch.setattr(NanoGPT, "forward", lambda self, x: x + 1)
    assert torch.equal(net(X), X + 1)
    assert len(taken) == 1


def test_it_is_copied_compiled_exported_and_called_by_threads(taken):
    net, plain = pair(Timm)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(X), net(X))
        assert is_swapped(other)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(X), plain(X))
    torch.testing.assert_close(torch.export.export(net, (X,)).module()(X), plain(X))
    torch.testing.assert_close(torch.jit.trace(net, X)(X), plain(X))
    found = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, net(X, attn_mask=MASK))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0], plain(X, MASK))
    assert all(taken)
