"""Modules of any class that are an activation, a norm or a linear layer, and those that are almost one."""

import copy

import pytest
import torch
from acceleration.test_accelerate import ScaledNorm, X, model
from torch import nn

import lspm_kernels as lk
from lspm_kernels.acceleration import lookalike_layers
from lspm_kernels.acceleration.lookalikes import Meaning, meaning
from lspm_kernels.acceleration.swap import is_swapped


class Shifted(ScaledNorm):
    """A norm of 1 + scale, as Gemma's."""

    def forward(self, hidden):
        scale, self_scale = self.scale, 1 + self.scale
        return super().forward(hidden) / scale * self_scale


class Centred(nn.Module):
    """A layer norm whose parameters have names of their own."""

    def __init__(self, features):
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.ones(features))
        self.floor = 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.shift + self.gain * x / (x.square().mean(-1, keepdim=True) + self.floor).sqrt()


class Kernel(nn.Module):
    """A linear layer by (in, out)."""

    def __init__(self, bias=True):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 48))
        self.shift = nn.Parameter(torch.randn(48)) if bias else None

    def forward(self, x):
        return x @ self.kernel if self.shift is None else x @ self.kernel + self.shift


class Tanh(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ScaledNorm(64), Meaning("rms_norm", weight="scale", eps="tiny")),
        (lambda: Shifted(64), Meaning("rms_norm", weight="scale", eps="tiny", offset=1.0)),
        (lambda: Centred(64), Meaning("layer_norm", weight="gain", bias="shift", eps="floor")),
        (Kernel, Meaning("linear", weight="kernel", bias="shift", transposed=True)),
        (lambda: Kernel(bias=False), Meaning("linear", weight="kernel", transposed=True)),
        (Tanh, Meaning("activation", activation="gelu_tanh")),
        (nn.Tanh, None),
        (nn.Identity, None),
        (lambda: nn.Dropout(0.0), None),
        (lambda: nn.LayerNorm((2, 32)), None),
        (lambda: nn.Bilinear(4, 4, 4), None),
    ],
)
def test_what_a_module_is_said_to_be(make, expected):
    module = make()
    plain = copy.deepcopy(module)
    assert meaning(module) == expected
    if expected is not None:
        lk.accelerate(module)
        torch.testing.assert_close(module(X), plain(X), rtol=1e-5, atol=1e-5)
        assert meaning(module) == expected


@pytest.mark.parametrize("make", [lambda: ScaledNorm(24), lambda: Kernel(bias=False), Tanh])
def test_torchs_defaults_do_not_count(make):
    """Of what is proven for the first time: classes of their own, as a proof is kept."""
    module = make()
    module.__class__ = type("Another", (type(module),), {})
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert meaning(module) is not None
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


class Counting(nn.Module):
    """SiLU, and a count of its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.silu(x)


class Clipped(nn.Module):
    """SiLU but for what is large."""

    def forward(self, x):
        return nn.functional.silu(x).clamp(max=3000.0)


class Detached(ScaledNorm):
    """The same numbers, with another gradient."""

    def forward(self, hidden):
        return super().forward(hidden).detach() + 0 * hidden


class Noisy(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x) + (torch.rand_like(x) - 0.5 if self.training else 0)


class OfFirst(ScaledNorm):
    """A norm of two dimensions only."""

    def forward(self, hidden):
        return super().forward(hidden if hidden.dim() == 2 else hidden.transpose(1, -1)).contiguous()


@pytest.mark.parametrize("make", [Counting, Clipped, Noisy, lambda: Detached(64), lambda: OfFirst(64)])
def test_what_is_almost_the_same_is_left_alone(make):
    module = make()
    report = lk.accelerate(nn.Sequential(module))
    assert not is_swapped(module)
    assert "0" not in report.replaced
    assert "calls" not in vars(module)


def test_what_is_set_later_counts():
    m = model()
    lk.accelerate(m)
    norm, act = m[0].norm, m[0].act
    norm.tiny = 0.5
    act.approximate = "tanh"
    plain = ScaledNorm(64)
    plain.scale, plain.tiny = norm.scale, 0.5
    torch.testing.assert_close(norm(X), plain(X))
    torch.testing.assert_close(act(X), nn.functional.gelu(X, approximate="tanh"), rtol=1e-6, atol=1e-6)
    other = Silu()
    lk.accelerate(other)
    other.function = torch.tanh
    assert torch.equal(other(X), torch.tanh(X))
    other.function = nn.functional.silu
    torch.testing.assert_close(other(X), nn.functional.silu(X))


class Silu(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = nn.functional.silu

    def forward(self, x):
        return self.function(x)


def test_silu_of_few_numbers_stays_as_it_was(monkeypatch):
    calls, kernel = [], lookalike_layers.bias_act.bias_act
    monkeypatch.setattr(
        lookalike_layers.bias_act, "bias_act", lambda *args: calls.append(args[0]) or kernel(*args)
    )
    module = Silu()
    lk.accelerate(module)
    few, many = torch.randn(2**16), torch.randn(3, 2**16)
    for x in (few, many):
        torch.testing.assert_close(module(x), nn.functional.silu(x), rtol=1e-6, atol=1e-6)
    assert len(calls) == 1 and calls[0] is many
