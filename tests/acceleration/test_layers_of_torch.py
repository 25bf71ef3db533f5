"""Which of torch.nn's layers become lspm_kernels.nn's, and why others do not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lspm_kernels as lk
from lspm_kernels import products
from lspm_kernels.acceleration import layers
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import Swap, swap, unswap


def ask(module):
    return layers.rule(module, "", module, Options())


class Renamed(nn.Conv2d):
    pass


class Padded(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(nn.functional.pad(input, (1, 1)), weight, bias)


class Named(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x)


class Halved(nn.MaxPool2d):
    def forward(self, input):
        return super().forward(input) / 2


KINDS = {
    nn.LayerNorm: (8,), nn.RMSNorm: (8,), nn.BatchNorm2d: (8,), nn.Conv2d: (8, 8, 3), nn.MaxPool2d: (2,),
    nn.GELU: (), nn.SiLU: (), nn.Dropout: (), nn.Embedding: (8, 8), nn.EmbeddingBag: (8, 8),
    nn.CrossEntropyLoss: (), nn.LinearCrossEntropyLoss: (8, 8), nn.MultiheadAttention: (8, 2),
    nn.TransformerEncoderLayer: (8, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_becomes_ours(kind):
    module = kind(*KINDS[kind])
    found = ask(module)
    assert found == Swap(getattr(lk.nn, kind.__name__), f"torch.nn.{kind.__name__}")
    names = list(vars(module))
    swap(module, found)
    assert isinstance(module, found.faster) and list(vars(module)) == names
    assert ask(module) == found
    unswap(module)
    assert type(module) is kind


def test_linear_becomes_ours_where_products_are_faster(monkeypatch):
    monkeypatch.setattr(products, "faster", True)
    assert ask(nn.Linear(3, 4)) == Swap(lk.nn.Linear, "torch.nn.Linear")
    monkeypatch.setattr(products, "faster", False)
    assert ask(nn.Linear(3, 4)) == "torch's product is as fast on this processor"


def test_a_swapped_layer_computes_by_its_kernel():
    module, x = nn.LayerNorm(128), torch.randn(600, 128)
    expected = module(x)
    swap(module, ask(module))
    torch.testing.assert_close(module(x), expected)
    with lk.use_backend("triton"), pytest.raises(NotImplementedError, match="layer_norm: triton needs"):
        module(x)
    with lk.use_backend("triton"):  # torch's forward
        assert torch.equal(module.double()(x.double()), nn.LayerNorm(128).double()(x.double()))


def test_a_swapped_layer_looks_once_at_what_is_parametrized():
    layers = [nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32, 40)]
    ours, x = nn.Sequential(*layers), torch.randn(64, 32, 3, 3)
    theirs = copy.deepcopy(ours)
    lk.accelerate(ours)
    for model in (ours, theirs):
        for place in (0, 4):
            torch.manual_seed(0)
            parametrizations.spectral_norm(model[place])
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_torchscript_is_told_to_compile_what_is_restored():
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(128)))
    lk.accelerate(model)
    rule = "a model given to torch.jit.script must have its own classes, got a replaced LayerNorm"
    with pytest.raises(RuntimeError, match=rule):
        torch.jit.script(model)
    torch.jit.script(lk.restore(model))


def test_subclasses():
    assert ask(Renamed(3, 4, 2)) == Swap(lk.nn.Conv2d, "torch.nn.Conv2d")
    assert ask(Padded(3, 4, 2)) == "its class overrides forward"
    assert ask(Halved(2)) == "its class overrides forward"
    assert ask(Named(8)) is None  # lookalikes.py may prove it to be the norm that it is
    for module in (nn.Tanh(), nn.Conv1d(2, 2, 2), nn.ReLU(), nn.Sequential()):
        assert ask(module) is None


LEFT = {
    "it normalises several dimensions": nn.LayerNorm((3, 4)),
    "its padding is not of zeros": nn.Conv2d(3, 4, 2, padding_mode="reflect"),
    "it has no running statistics with a momentum": nn.BatchNorm2d(3, momentum=None),
    "it returns indices": nn.MaxPool2d(2, return_indices=True),
    "it has a max_norm": nn.Embedding(3, 4, max_norm=1.0),
    "its gradient is sparse": nn.EmbeddingBag(3, 4, sparse=True),
    "it scales gradients by frequency": nn.Embedding(3, 4, scale_grad_by_freq=True),
    "its mode is 'max'": nn.EmbeddingBag(3, 4, mode="max"),
    "it adds keys of its own": nn.MultiheadAttention(4, 2, add_zero_attn=True),
    "it works in place": nn.Dropout(inplace=True),
    "its loss has several dimensions": nn.LinearCrossEntropyLoss(3, 4, out_features=(2,)),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_alone(reason):
    assert ask(LEFT[reason]) == reason
