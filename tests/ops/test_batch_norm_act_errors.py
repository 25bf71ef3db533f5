"""What batch_norm_act and its binding refuse, word for word."""

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

X = torch.ones(2, 4, 3, 3)
GIVEN = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
WRONG = {
    "x must be a floating-point tensor (N, C, ...), got list": {"x": [1.0]},
    "x must be a floating-point tensor (N, C, ...), got (4,) torch.float32": {"x": torch.ones(4)},
    "x must be a floating-point tensor (N, C, ...), got (2, 4) torch.int64": {"x": torch.ones(2, 4).long()},
    "activation must be one of None, relu, relu6, silu, gelu, got 'tanh'": {"activation": "tanh"},
    "activation must be one of None, relu, relu6, silu, gelu, got ['relu']": {"activation": ["relu"]},
    "momentum must be at least 0 and at most 1, got None": {"momentum": None},
    "momentum must be at least 0 and at most 1, got 1.5": {"momentum": 1.5},
    "eps must be finite and at least 0, got -1": {"eps": -1},
    "weight must be a tensor of shape (4,), got (3,)": {"weight": torch.ones(3)},
    "bias must be a tensor of shape (4,), got float": {"bias": 1.0},
    "bias must have dtype torch.float32, got torch.float16": {"bias": torch.ones(4).half()},
    "running_mean must be a tensor of shape (4,), got (2,)": GIVEN | {"running_mean": torch.ones(2)},
    "running_var must be on x's device cpu, got meta": GIVEN | {"running_var": torch.ones(4, device="meta")},
    "running_mean and running_var must be given together, got running_mean alone": {
        "running_mean": torch.zeros(4)
    },
    "running_mean and running_var must be given together, got running_var alone": {
        "running_var": torch.zeros(4)
    },
    "residual must be a tensor of x's shape (2, 4, 3, 3), got (2, 4)": {"residual": torch.ones(2, 4)},
    "residual must be on x's device cpu, got meta": {"residual": X.to("meta")},
    "residual must be a floating-point tensor, got (2, 4, 3, 3) torch.complex64": {
        "residual": X.to(torch.complex64)
    },
    "x must have more than one value per channel to take statistics of, got (1, 4, 1, 1)": {
        "x": torch.ones(1, 4, 1, 1)
    },
    "x must have more than one value per channel to take statistics of, got (0, 4)": {"x": torch.ones(0, 4)},
    "process_group must be a torch.distributed.ProcessGroup, got int": {"process_group": 1},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError) as error:
        lk.batch_norm_act(**({"x": X, "training": True} | WRONG[message]))
    assert str(error.value) == f"batch_norm_act: {message}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("running_mean", float("nan"), "running_mean must be finite, got nan in channel 2"),
        ("running_mean", float("inf"), "running_mean must be finite, got inf in channel 2"),
        ("running_var", float("nan"), "running_var must be finite and not negative, got nan in channel 2"),
        ("running_var", -0.5, "running_var must be finite and not negative, got -0.500000 in channel 2"),
    ],
)
def test_running_statistics_that_are_none(name, value, message, backend):
    given = {key: t.clone() for key, t in GIVEN.items()}
    given[name][2] = value
    with pytest.raises(ValueError) as error:
        lk.batch_norm_act(X, **given, backend=backend)
    assert str(error.value) == f"batch_norm_act: {message}"
    lk.batch_norm_act(X, **given, training=True, backend=backend)  # reads them for nothing but their update


def test_the_binding_refuses_what_would_touch_other_memory():
    x, vector = torch.ones(6, 40), torch.ones(40)
    y = torch.empty_like(x)
    forward, sums = compiled.cpu.batch_norm_act_forward, compiled.cpu.batch_norm_act_sums
    options = (1e-5, 0, True, 1)
    for message, wrong in {
        "y must have another number of elements": (x, None, None, None, vector, vector, y[:3]),
        "residual must have another number of elements": (x, x[:2], None, None, vector, vector, y),
        "weight must have another number of elements": (x, None, vector[:3], None, vector, vector, y),
        "variance must have another number of elements": (x, None, None, None, vector, vector[:3], y),
        "x must be contiguous": (torch.ones(40, 6).t(), None, None, None, vector, vector, y),
        "mean must have the dtype": (x, None, None, None, vector.double(), vector, y),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(*wrong, *options)
    with pytest.raises(ValueError, match="activation must be 0 to 4"):
        forward(x, None, None, None, vector, vector, y, 1e-5, 5, True, 1)
    partial, found = torch.empty(1, 2, 40), torch.empty(2, 40)
    with pytest.raises(ValueError, match="dresidual must have another number of elements"):
        sums(x, x, None, None, None, vector, vector, y[:3], partial, found, 1e-5, 0, 1)
    with pytest.raises(ValueError, match="partial must have another number of elements"):
        sums(x, x, None, None, None, vector, vector, y, partial[..., :3].contiguous(), found, 1e-5, 0, 1)
    with pytest.raises(ValueError, match="partial must have 3 dimensions"):
        compiled.cpu.batch_norm_act_statistics(x, found, vector, vector, 1)
    with pytest.raises(ValueError, match="x must have elements, or be None where partial is filled"):
        compiled.cpu.batch_norm_act_statistics(x[:0], torch.zeros(1, 3, 40), vector, vector, 1)


def test_the_binding_ends_where_there_are_no_channels():
    x, vector, partial, sums = torch.ones(6, 0), torch.ones(0), torch.empty(1, 2, 0), torch.empty(2, 0)
    compiled.cpu.batch_norm_act_sums(x, x, None, None, None, vector, vector, None, partial, sums, 1e-5, 0, 1)
