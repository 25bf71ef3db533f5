"""What a few inputs do not show of a module: where its course depends on more, it is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import is_grad_enabled, nn

import lspm_kernels as lk
from lspm_kernels.acceleration import courses, rotations
from lspm_kernels.acceleration.lookalikes import meaning

FACTOR = 1.0
X = torch.randn(600, 128, generator=torch.Generator().manual_seed(0))


class ByFeatures(nn.Module):
    def forward(self, x):
        return F.silu(x) if x.shape[-1] < 50 else F.relu(x)


class ByNumbers(nn.Module):
    def forward(self, x):
        if x.numel() > 10_000:
            return F.relu(x)
        return F.silu(x)


class ByDtype(nn.Module):
    def forward(self, x):
        return F.silu(x) if x.dtype is torch.float64 else F.relu(x)


class ByMode(nn.Module):
    def forward(self, x):
        return F.silu(x) if torch.is_grad_enabled() else F.relu(x)


class ByModeInNumbers(nn.Module):
    def forward(self, x):
        return F.silu(x) * (2 - float(is_grad_enabled()))


class ByGraph(nn.Module):
    def forward(self, x):
        return F.silu(x) * (2 - (x.grad_fn is None))


class ByGradient(nn.Module):
    def forward(self, x):
        return F.silu(x) if x.requires_grad else F.relu(x)


def chosen(x):
    return F.silu(x) if x.dim() < 2 else F.relu(x)


class ByFunction(nn.Module):
    def forward(self, x):
        return chosen(x)


class ByGlobal(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(FACTOR * x)


class ByClass(nn.Module):
    factor = 1.0

    def forward(self, x):
        return x * torch.sigmoid(self.factor * x)


class Settings:
    factor = 1.0


class BySettings(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps, self.settings = 1e-6, Settings()
        self.weight = nn.Parameter(torch.rand(128))

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y * self.weight * self.settings.factor


class Capped(nn.Module):
    def forward(self, x):
        return F.silu(x).clamp(max=3e4)


@pytest.mark.parametrize(
    "cls",
    [
        ByFeatures,
        ByNumbers,
        ByDtype,
        ByMode,
        ByModeInNumbers,
        ByGraph,
        ByGradient,
        ByFunction,
        ByGlobal,
        ByClass,
        BySettings,
        Capped,
    ],
)
def test_numbers_are_not_believed(cls):
    module = cls()
    assert meaning(module) is None
    plain, x = copy.deepcopy(module), X * 1e5 if cls is Capped else X
    lk.accelerate(module)
    with torch.no_grad():
        assert torch.equal(module(x), plain(x))


class Private(nn.Module):
    """What it computes stands in an attribute that begins with an underscore."""

    def __init__(self):
        super().__init__()
        self._factor, self.unread, self.act = 1.0, {}, F.silu
        self.as_widened = False

    def widened(self, x):
        return x.double() if self.as_widened else x

    def forward(self, x):
        return self.act(self.widened(x) * self._factor)


def test_attributes_that_a_forward_reads_count_and_no_others():
    assert courses.read_by(Private) == {"_factor", "act", "as_widened"}
    module = Private()
    report = lk.accelerate(module)
    assert report.replaced[""] == "activation silu"
    torch.testing.assert_close(module(X), F.silu(X))
    module._noted = object()
    assert module.lspm is not None
    module._factor = 3.0
    torch.testing.assert_close(module(X), F.silu(3 * X))


class Derived(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x)


def test_a_base_class_forward_is_read():
    assert meaning(Derived(128)).kind == "layer_norm"
    assert courses.read_by(Derived) >= {"eps", "normalized_shape"}


def turned(x):
    one, other = x.chunk(2, -1)
    return torch.cat((-other, one), -1)


def rotate(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotate_by_length(q, k, cos, sin):
    if q.shape[2] > 16:
        cos = cos * 2
    return rotate(q, k, cos, sin)


def test_rotations_have_one_course():
    assert rotations.known(rotate, {}) is not None
    assert rotations.known(rotate_by_length, {}) is None
