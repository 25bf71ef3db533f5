"""accelerate on networks of images: chains of convolution, norm, sum and activation, in any way to say it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration import graphs
from lspm_kernels.acceleration.image_kernels import Chain
from lspm_kernels.acceleration.swap import is_swapped

torch.manual_seed(0)


def is_traced(module):
    return is_swapped(module) and type(module).lspm_faster is graphs.Traced


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 5)
        self.head = nn.Linear(32 * 5 * 5, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.view(x.size(0), -1))


class Basic(nn.Module):
    def __init__(self, ins=16, outs=24, stride=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(ins, outs, 1, stride), nn.BatchNorm2d(outs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Inverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.BatchNorm2d(48), nn.SiLU())
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x):
        return torch.add(x, self.project(self.depthwise(self.expand(x))))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.blocks = nn.Sequential(Dense(), nn.Conv2d(24, 16, 1), Inverted(), Basic())

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return x.view(x.shape[0], -1)


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def settled(net):
    """With running statistics and parameters that change something."""
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean, module.running_var):
                t.data.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return net


def check(net, x=X):
    """accelerate(net) against net in float64, in both modes: outputs, all gradients and the statistics."""
    plain = copy.deepcopy(net)
    lk.accelerate(net)
    for mode in (True, False, True):
        wide = copy.deepcopy(plain).double()
        for each in (net, plain, wide):
            each.train(mode)
        names = [name for name, _ in net.named_parameters()]

        def run(module, x, *parameters, names=names):
            return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

        tensors = [x, *net.parameters()]
        actual = oracle.outputs_and_gradients(lambda *t: run(net, *t), tensors)
        eager = oracle.outputs_and_gradients(lambda *t, plain=plain: run(plain, *t), tensors)
        doubles = [t.detach().double() for t in tensors]
        truth = oracle.outputs_and_gradients(lambda *t, wide=wide: run(wide, *t), doubles)
        for name in truth:
            oracle.compare(name, actual[name], truth[name], eager[name])
        for (name, ours), exact, theirs in zip(
            net.named_buffers(), wide.buffers(), plain.buffers(), strict=True
        ):
            oracle.compare(name, ours, exact.to(exact.dtype), theirs) if ours.is_floating_point() else None
            assert ours.is_floating_point() or torch.equal(ours, theirs)
    return plain


def taken(monkeypatch):
    """What kernels are called with, by the names of the chains."""
    names, inner = [], Chain._takes

    def takes(self, *args):
        if found := inner(self, *args):
            names.append(self.name)
        return found

    monkeypatch.setattr(Chain, "_takes", takes)
    return names


@pytest.mark.parametrize(
    ("net", "chains"),
    [
        (LeNet, {"conv2d + relu"}),
        (Net, {"conv2d + batch_norm + relu", "conv2d + batch_norm + add + relu", "batch_norm + relu"}),
    ],
)
def test_chains_are_what_their_parts_are(net, chains, monkeypatch):
    names = taken(monkeypatch)
    check(settled(net()), X.repeat(48, 1, 1, 1))
    assert chains <= set(names)


def test_outputs_lie_as_they_did_and_restore_gives_the_same_bits():
    net = settled(Basic()).eval()
    x = torch.randn(32, 16, 32, 32)
    expected = net(x)
    lk.accelerate(net)
    assert net(x).stride() == expected.stride()
    last = net(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    lk.restore(net)
    assert torch.equal(net(x), expected)
    net.to(memory_format=torch.channels_last)
    expected = net(x)  # channels_last, as the weights are
    lk.accelerate(net)
    assert net(x).stride() == expected.stride() != x.stride()


def test_copies_pickles_and_functional_calls_have_their_own_parameters():
    net = settled(Basic()).eval()
    x, other = torch.randn(32, 16, 32, 32), settled(Basic()).eval()
    plain, expected = copy.deepcopy(net), other(x)
    lk.accelerate(net)
    torch.testing.assert_close(net(x), plain(x))
    torch.testing.assert_close(functional_call(net, dict(other.state_dict()), (x,)), expected)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert is_traced(one)
        torch.testing.assert_close(one(x), plain(x))
        one.load_state_dict(other.state_dict())
        torch.testing.assert_close(one(x), expected)
    torch.testing.assert_close(net(x), plain(x))


def test_inference_follows_its_weights():
    net = settled(Basic()).eval()
    x, plain = torch.randn(32, 16, 32, 32), copy.deepcopy(net)
    lk.accelerate(net, inference=True)
    for each in (net, plain):
        each.requires_grad_(False)
    torch.testing.assert_close(net(x), plain(x))
    for each in (net, plain):
        each.conv1.weight.mul_(2)
        each.bn2.running_mean.add_(1)
        each.conv2.weight = nn.Parameter(each.conv2.weight * 3, requires_grad=False)
    torch.testing.assert_close(net(x), plain(x))


def test_compile_and_export_take_the_forward_as_it_was():
    net = settled(Basic()).eval()
    x, plain = torch.randn(2, 16, 16, 16), copy.deepcopy(net)
    lk.accelerate(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), plain(x))


def test_vmap_takes_the_forward_as_it_was():
    net = settled(Basic()).eval()
    x, plain = torch.randn(3, 1, 16, 32, 32), copy.deepcopy(net)
    lk.accelerate(net)
    torch.testing.assert_close(torch.vmap(net)(x), torch.vmap(plain)(x))


def test_under_autocast_no_kernel_takes_it_so_its_memory_is_left_alone():
    block = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
    plain, x = copy.deepcopy(block), torch.randn(2, 16, 128, 128)
    lk.accelerate(block)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [module(x) for module in (block, plain)]
    gradients = [
        torch.autograd.grad(y.float().square().sum(), module.parameters())
        for y, module in zip(outputs, (block, plain), strict=True)
    ]
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *gradients))
