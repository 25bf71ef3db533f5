"""Forwards that torch.fx would take for something else, and modules that change after accelerate."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lspm_kernels as lk
from lspm_kernels.acceleration import graphs
from lspm_kernels.acceleration.image_kernels import Chain
from lspm_kernels.acceleration.swap import is_swapped

X = torch.randn(2, 8, 48, 48, generator=torch.Generator().manual_seed(0))
SCALE = [2.0]
OFFSET = 1.0


def is_traced(module):
    return is_swapped(module) and type(module).lspm_faster is graphs.Traced


class Net(nn.Module):
    """A chain that a kernel takes, unless a subclass's forward says more."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.flag, self.settings, self.other = True, {"scale": 2.0}, None

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class ByValue(Net):
    def forward(self, x):
        return self.act(self.bn(self.conv(x))) if x.sum() > 0 else x


class ByType(Net):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x * 2
        return self.act(self.bn(self.conv(x)))


class ByMode(Net):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * 2 if torch.is_grad_enabled() else y


class ByGlobal(Net):
    def forward(self, x):
        return self.act(self.bn(self.conv(x))) * SCALE[0]


class BySettings(Net):
    def forward(self, x):
        return self.act(self.bn(self.conv(x))) * self.settings["scale"]


class Counting(Net):
    def forward(self, x):
        self.flag = not self.flag
        return self.act(self.bn(self.conv(x)))


class Random(Net):
    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + torch.rand(1)


class InPlace(Net):
    def forward(self, x):
        x.mul_(2)
        return self.act(self.bn(self.conv(x)))


class InPlaceOfTwo(Net):
    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.bn(y), inplace=True) + y.relu_() + y


class WithGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            return self.act(self.bn(self.conv(x)))


LEFT = {
    ByValue: "torch.fx cannot follow",
    ByType: "isinstance",
    ByMode: "torch.is_grad_enabled",
    ByGlobal: "SCALE",
    BySettings: "self.settings",
    Counting: "self.flag",
    Random: "torch.rand",
    InPlace: "in place",
    InPlaceOfTwo: "in place",
    WithGrad: "with torch.no_grad()",
}


@pytest.mark.parametrize("cls", LEFT)
def test_what_cannot_be_proven_is_left_alone(cls):
    net = cls()
    report = lk.accelerate(net)
    assert not is_traced(net)
    assert LEFT[cls] in report.left[""]


class Changing(Net):
    def __init__(self):
        super().__init__()
        self.checked = False

    def forward(self, x, more=None, scale=1.0):
        if self.checked and x.numel() > 0:
            x = x * SCALE[0]
        y = self.bn(self.conv(x))
        y = self.act(y) if self.flag else y
        if self.other is not None:
            y = self.other(y)
        y = y + more if more is not None else y
        return self.helped(y) * scale

    def helped(self, y):
        return y + OFFSET


def pair():
    net = Changing()
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    assert is_traced(net)
    return net, plain


def same(net, plain, *args, **kwargs):
    torch.testing.assert_close(net(*args, **kwargs), plain(*args, **kwargs))


LAST = X.contiguous(memory_format=torch.channels_last)


def other_flag(net):
    net.flag = False


def an_unproven_way(net):
    net.checked = True


def another_module(net):
    net.other = nn.Conv2d(8, 8, 1)
    nn.init.constant_(net.other.weight, 0.1)
    nn.init.zeros_(net.other.bias)


def another_conv(net):
    net.conv = nn.Sequential(net.conv, nn.Tanh())


def another_act(net):
    net.act = nn.Sigmoid()


def a_hook(net):
    net.bn.register_forward_hook(lambda module, args, y: y * 3)


def a_pre_hook(net):
    net.act.register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def a_forward(net):
    net.conv.forward = lambda x: x + 1


def a_method(net):
    net.helped = lambda y: y + 100


def parametrized(net):
    parametrizations.weight_norm(net.conv)


def frozen(net):
    net.bn.eval()


CHANGES = [
    other_flag, an_unproven_way, another_module, another_conv, another_act, a_hook, a_pre_hook, a_forward,
    a_method, parametrized, frozen,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change):
    net, plain = pair()
    same(net, plain, LAST)
    for each in (net, plain):
        change(each)
    same(net, plain, X)
    same(net, plain, LAST)
    same(net.eval(), plain.eval(), LAST)


def test_other_inputs_go_the_way_they_went():
    net, plain = pair()
    for args, kwargs in (
        ((LAST, LAST), {}),
        ((LAST,), {"scale": 2.0}),
        ((), {"x": LAST}),
        ((LAST, None, 3.0), {}),
        ((LAST[:, :, :2, :2],), {}),
        ((LAST[:0],), {}),
    ):
        same(net.eval(), plain.eval(), *args, **kwargs)
    same(net.double(), plain.double(), LAST.double())
    with pytest.raises(TypeError, match="unknown"):
        net(LAST, unknown=1)
    with pytest.raises(TypeError, match="forward"):
        net()


def test_a_constant_of_the_file_is_followed(monkeypatch):
    net, plain = pair()
    same(net, plain, LAST)
    monkeypatch.setitem(globals(), "OFFSET", 5.0)
    same(net, plain, LAST)


class Twice(Net):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return self.act(self.bn(self.conv(y)))


def test_layers_used_twice_are_called_twice():
    net = Twice()
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    same(net, plain, LAST)
    assert net.bn.num_batches_tracked == plain.bn.num_batches_tracked == 2
    torch.testing.assert_close(net.bn.running_mean, plain.bn.running_mean)


class Viewing(nn.Module):
    def forward(self, x):
        if type(x) is not torch.Tensor:
            raise TypeError
        return x.view(x.shape[0], -1)


def test_a_module_that_is_not_known_gets_memory_as_before():
    net = nn.Sequential(Net(), Viewing()).eval()
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    same(net, plain, X)


class Erasing(nn.Module):
    def forward(self, x):
        return x.mul_(0)


class Late(Net):
    def forward(self, x):
        x = x + 1
        y = self.conv(x)
        z = self.act(x)
        return self.bn(y) + z


def test_a_convolution_reads_its_input_before_another_module_writes_there():
    net = Late()
    net.act = nn.Sequential(Erasing(), nn.Identity())
    net.requires_grad_(False)
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    same(net, plain, LAST)


def test_kernels_take_large_images_in_channels_last_memory_only(monkeypatch):
    net, plain = pair()
    taken, takes = [], Chain._takes
    monkeypatch.setattr(Chain, "_takes", lambda *args: taken.append(takes(*args)) or taken[-1])
    for x in (LAST[:1, :, :4, :4].contiguous(memory_format=torch.channels_last), LAST, LAST.double()):
        for each in (net, plain):
            each.to(x.dtype)
        same(net.eval(), plain.eval(), x)
    assert taken == [False, True, False]
