"""Forwards that write in place, which torch.fx alone would take for what gives new memory."""

import copy

import pytest
import torch
from torch import nn

import lspm_kernels as lk
from lspm_kernels.acceleration import graphs
from lspm_kernels.acceleration.swap import is_swapped

X = torch.randn(2, 8, 48, 48, generator=torch.Generator().manual_seed(0))


def is_traced(module):
    return is_swapped(module) and type(module).lspm_faster is graphs.Traced


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.act = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def first(self, x):
        return self.act(self.bn(self.conv1(x)))


class OfTwoNames(Net):
    def forward(self, x):
        y = self.first(x)
        z = y
        y += self.conv2(y)
        return y + z


class OfItsInput(Net):
    def forward(self, x):
        x *= 2
        return self.first(x)


class OfAView(Net):
    def forward(self, x):
        y = self.first(x)
        flat = y.flatten(1)
        flat -= 1
        return y


class OfATransposedView(Net):
    def forward(self, x):
        y = self.first(x)
        turned = y.mT
        turned /= 2
        return y


class ByOut(Net):
    def forward(self, x):
        y = self.first(x)
        z = self.conv2(y)
        torch.add(y, 1, out=y)
        return y + z


@pytest.mark.parametrize("cls", [OfTwoNames, OfItsInput, OfAView, OfATransposedView, ByOut])
def test_what_else_is_read_is_written(cls):
    net = cls().eval()
    before = copy.deepcopy(net)
    report = lk.accelerate(net)
    assert "works in place on what else is read" in report.left[""]
    x, y = X.clone(), X.clone()
    with torch.no_grad():
        assert torch.allclose(net(x), before(y), atol=1e-5)
    assert torch.equal(x, y)


class Residual(Net):
    def forward(self, x):
        y = self.bn(self.conv1(x))
        y += x
        return self.act(y)


@pytest.mark.parametrize("training", [False, True])
def test_a_residual_sum_in_place_keeps_its_dtype(training):
    net = Residual().train(training)
    before = copy.deepcopy(net)
    report = lk.accelerate(net)
    assert is_traced(net) and report.replaced[""] == "conv2d + batch_norm + add + relu"
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = net(X), before(X)
    assert out.dtype is expected.dtype is torch.bfloat16
    out, expected = net(X), before(X)
    assert out.dtype is expected.dtype is torch.float32
    assert torch.allclose(out, expected, atol=1e-5)
