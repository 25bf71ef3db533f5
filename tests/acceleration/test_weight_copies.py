"""accelerate(model, inference=True, dtype=...): linear layers read copies of their weights in fewer bits."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration.weight_copies import WeightCopy

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(64, 48)), nn.Parameter(torch.randn(48))

    def forward(self, inputs):
        return torch.addmm(self.shift, inputs.view(-1, 64), self.kernel).view(*inputs.shape[:-1], 48)


@pytest.fixture(params=[Transposed, lambda: nn.Linear(64, 48), lambda: nn.Linear(64, 48, bias=False)])
def layer(request):
    return request.param().eval()


def rounded(layer, dtype):
    """The layer in float64, with weights as a copy in dtype has them."""
    made = copy.deepcopy(layer).double()
    weight = max(made.parameters(), key=torch.Tensor.dim)
    own = weight.detach().float()
    if dtype == torch.int8:
        rows = own.t() if type(layer) is Transposed else own
        values, scales = lk.quantize_int8(rows.contiguous())
        rows = values.double() * scales.double()
        weight.data = rows.t() if type(layer) is Transposed else rows
    else:
        weight.data = own.to(dtype).double()
    return made


@pytest.mark.parametrize("rows", [(3,), (2, 5), (40, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@torch.no_grad()
def test_it_is_the_layer_of_the_copy(layer, dtype, rows):
    x = torch.randn(*rows, 64)
    exact = rounded(layer, dtype)
    plain = copy.deepcopy(exact).float()(x)
    report = lk.accelerate(layer, inference=True, dtype=dtype)
    assert report.replaced[""].endswith(str(dtype).removeprefix("torch."))
    oracle.compare("y", layer(x), exact(x.double()), plain)


def test_the_copy_follows_the_weight_and_is_nowhere_else(layer):
    weight = max(layer.parameters(), key=torch.Tensor.dim)
    keys, before = list(layer.state_dict()), layer(X)
    lk.accelerate(layer, inference=True, dtype=torch.bfloat16)
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer(X), before)  # with gradients it is the weight itself
    with torch.no_grad():
        first = layer(X)
        assert not torch.equal(first, before)
        assert layer.lspm.of(weight)[0] is layer.lspm.of(weight)[0]
        weight.mul_(2)
        second = layer(X)
        bias = 0 if len(keys) == 1 else min(layer.parameters(), key=torch.Tensor.dim)
        torch.testing.assert_close(second - bias, 2 * (first - bias), rtol=1e-5, atol=1e-5)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert isinstance(copied.lspm, WeightCopy)
            assert copied.lspm is not layer.lspm
            assert torch.equal(copied(X), second)
        layer.train()
        assert torch.equal(layer(X), lk.restore(layer)(X))


@torch.no_grad()
def test_what_it_does_not_take_is_the_weight_itself(layer):
    plain = copy.deepcopy(layer)
    lk.accelerate(layer, inference=True, dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(X), plain(X))
    assert torch.equal(layer.double()(X.double()), plain.double()(X.double()))
    with torch.inference_mode():
        assert layer.float()(X).shape == (3, 48)


def test_the_copy_follows_weights_that_come_later_and_those_without_a_version():
    layer = nn.Linear(64, 48, bias=False).eval()
    lk.accelerate(layer, inference=True, dtype=torch.bfloat16)
    ones = torch.ones(48, 64)
    with torch.no_grad():
        layer(X)
        # Another parameter in the same memory, as where one is freed and the next gets its place.
        layer.weight.data.copy_(ones)
        layer.weight = nn.Parameter(layer.weight.data)
        torch.testing.assert_close(layer(X), X @ ones.t())
    with torch.inference_mode():
        layer.weight = nn.Parameter(ones.clone())
        layer(X)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(X), X @ (2 * ones).t())
