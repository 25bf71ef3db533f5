"""WeightOnlyLinear, and models whose layers it takes the place of."""

import copy

import pytest
import torch
from torch import nn

import lspm_kernels as lk
from lspm_kernels import WeightOnlyLinear, weight_only_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer(dtype):
    layer = nn.Linear(96, 20)
    ours = WeightOnlyLinear(layer.weight, layer.bias, dtype=dtype)
    assert not list(ours.parameters()) and ours.in_features == 96 and ours.out_features == 20
    x = torch.randn(2, 3, 96)
    y = ours(x)
    small, scales = lk.quantize_int8(layer.weight) if dtype == torch.int8 else (layer.weight.to(dtype), None)
    assert torch.equal(y, lk.linear(x, small.detach(), layer.bias.detach(), scales=scales))
    # Half a step of 8 bits, of 96 products
    assert (y - layer(x)).abs().max() < {torch.int8: 0.02, torch.bfloat16: 0.02}.get(dtype, 1e-3)


def test_a_weight_is_kept_where_it_has_the_dtype():
    layer = nn.Linear(8, 4)
    assert WeightOnlyLinear(layer.weight, dtype=torch.float32).weight.data_ptr() == layer.weight.data_ptr()


def test_a_model():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.ModuleDict({"deep": nn.Linear(48, 10)}))
    head = model[2]["deep"]
    assert weight_only_(model, torch.int8, group_size=32) is model
    assert isinstance(model[0], WeightOnlyLinear) and model[0].scales.shape == (48, 2)
    assert model[2]["deep"].scales.shape == (10, 1)  # 32 does not divide 48
    assert "in_features=64, out_features=48, dtype=int8, groups=2" in repr(model)
    assert isinstance(weight_only_(head, torch.bfloat16), WeightOnlyLinear)


def test_moves_and_is_saved_with_the_model():
    ours = WeightOnlyLinear(torch.randn(20, 64), dtype=torch.int8, group_size=32)
    other = WeightOnlyLinear(torch.randn(20, 64), dtype=torch.int8, group_size=32)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 64)
    assert torch.equal(other(x), ours(x)) and set(ours.state_dict()) == {"weight", "scales"}
    assert ours.to("meta").weight.device.type == "meta"


def layers():
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)), torch.randn(96, 128)


def transformer():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 64, 64)


@pytest.mark.parametrize("options", [{}, {"inference": True}, {"inference": True, "dtype": torch.bfloat16}])
@pytest.mark.parametrize("build", [layers, transformer])
def test_what_accelerate_replaced_is_converted_and_the_rest_restored(build, options):
    model, x = build()
    model.eval()
    plain = weight_only_(copy.deepcopy(model))
    lk.accelerate(model, **options)
    with torch.no_grad():
        model(x)  # chains and copies of weights are made
        weight_only_(model)
        kinds = [type(module) for module in plain.modules()]
        assert kinds.count(WeightOnlyLinear) >= 2
        converted = [isinstance(module, WeightOnlyLinear) for module in model.modules()]
        assert converted == [kind is WeightOnlyLinear for kind in kinds]
        torch.testing.assert_close(model(x), plain(x))
        lk.restore(model)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(model(x), plain(x))


def test_drop_in_layers_are_converted_if_they_are_but_linear():
    model = nn.Sequential(lk.nn.Linear(8, 8), lk.nn.Linear(8, 8, activation="gelu"))
    assert [type(module) for module in weight_only_(model)] == [WeightOnlyLinear, lk.nn.Linear]


def test_torchs_fast_path_does_not_read_the_weights():
    model, x = transformer()
    expected = weight_only_(model.eval())(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


W = torch.randn(4, 64)
ERRORS = {
    "WeightOnlyLinear: dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.int8, got "
    "torch.int32": lambda: WeightOnlyLinear(W, dtype=torch.int32),
    "WeightOnlyLinear: group_size must be None beside torch.float32, got 32": (
        lambda: WeightOnlyLinear(W, dtype=torch.float32, group_size=32)
    ),
    "WeightOnlyLinear: weight must be a floating-point tensor of two dimensions, got NoneType": (
        lambda: WeightOnlyLinear(None)
    ),
    "WeightOnlyLinear: bias must be a tensor of shape (4,), got (3,)": (
        lambda: WeightOnlyLinear(W, torch.zeros(3))
    ),
    "weight_only_: group_size must be an integer from 1 to 2 ** 63 - 1, got 0": (
        lambda: weight_only_(torch.nn.Linear(64, 4), group_size=0)
    ),
    "weight_only_: model must be a torch.nn.Module, got NoneType": lambda: weight_only_(None),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((ValueError, TypeError)) as error:
        ERRORS[message]()
    assert str(error.value) == message
