"""The Triton kernels of batch_norm_act, as Triton compiles them, executed on the CPU (tests/cuda_on_cpu)."""

import dataclasses
import itertools

import pytest
import torch
from ops.test_batch_norm_act import BF16, F16, F32, check, function, tensors

import lspm_kernels as lk
import oracle
from lspm_kernels import batch_norm, dispatch
from lspm_kernels.ops import batch_norm_act as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

TRAINING = ["_statistics_kernel", "_merge_kernel", "_forward_kernel", "_sums_kernel", "_sum_runs_kernel"]
TRAINING += ["_backward_kernel"]
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
# shape, dtype, activation, whether there is a residual, training
CASES = {
    "whole tiles": ((4, 64, 8, 8), F32, "relu", True, True),
    "several runs, rows that fill no tile": ((3, 20, 15, 15), BF16, None, True, True),
    "several blocks of channels": ((2, 200, 5, 5), F16, "silu", True, True),
    "one channel": ((3, 1, 7, 9), F32, "gelu", False, True),
    "three channels": ((2, 3, 31, 31), BF16, "relu6", True, True),
    "two dimensions": ((9, 70), F32, "relu", False, True),
    "constants, by the output": ((2, 40, 5, 5), BF16, "relu", True, False),
    "constants, by x": ((2, 40, 5, 5), F32, "gelu", True, False),
}


@pytest.fixture
def here(driver, monkeypatch):
    """The driver, with the rows of the tables that say triton taking tensors on the CPU."""
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    row = dataclasses.replace(row, device="cpu", missing=lambda: None)
    monkeypatch.setattr(ops, "BACKENDS", (row,))
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    monkeypatch.setattr(batch_norm, "_RUNS", {"cpu": 3})
    return driver


# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@on_one_gpu
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(here, name):
    shape, dtype, activation, residual, training = CASES[name]
    check(tensors(shape, dtype, residual=residual), activation=activation, training=training)
    assert here.launches == (TRAINING if training else TRAINING[2:])


@pytest.mark.long
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "gelu"])
def test_every_activation(here, activation):
    for residual, training in itertools.product((True, False), repeat=2):
        for dtype in (F32, BF16, F16):
            check(tensors((2, 40, 5, 5), dtype, residual=residual), activation=activation, training=training)


@on_one_gpu
def test_what_may_be_absent(here):
    x, residual, _, bias = tensors((2, 40, 5, 5))
    check([x, residual, None, bias], activation="relu")
    check([x, None, None, None], activation=None, running=False)


@on_one_gpu
def test_a_large_mean_cancels_nothing(here):
    x, _, weight, bias = tensors((2, 20, 15, 15))
    check([x + 1000, None, weight, bias], gradients=False)


@on_one_gpu
def test_same_bits_under_any_schedule(here):
    inputs = tensors((3, 20, 15, 15), BF16)
    results = []
    for seed in range(3):
        here.seed = seed
        results.append(oracle.outputs_and_gradients(function(lk.batch_norm_act, True, "relu"), inputs))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@on_one_gpu
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_special_values(here, value):
    x, _, weight, bias = tensors((2, 20, 7, 7))
    x[1, 7, 3, 3] = value
    check([x, None, weight, bias], gradients=False)


@on_one_gpu
def test_partials_that_another_kernel_has_filled(driver):
    from lspm_kernels.triton import batch_norm_act

    x = torch.randn(4, 10, 7) + torch.arange(4)[:, None, None] * 100
    partial = torch.stack((torch.full((4, 7), 10.0), x.mean(1), x.var(1, correction=0) * 10), 1)
    mean, variance = (triton_driver.uninitialised(torch.empty(7)) for _ in range(2))
    batch_norm_act.statistics(None, partial, mean, variance)
    torch.testing.assert_close(mean, x.mean((0, 1)))
    torch.testing.assert_close(variance, x.var((0, 1), correction=0))


@pytest.mark.parametrize("sm", [80, 90, pytest.param(100, marks=pytest.mark.long)], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    from lspm_kernels.triton import batch_norm_act

    with triton_driver.activated(sm, execute=False) as driver:
        for channels, dtype, activation in [(64, F32, 4), (256, BF16, 1), (3, F16, 3)]:
            x, vector, partial = (
                torch.empty(2, 8, channels).to(dtype),
                torch.empty(channels),
                torch.empty(2, 3, channels),
            )
            known = (vector,) * 4
            batch_norm_act.statistics(x, partial, vector, vector)
            batch_norm_act.forward(x, x, *known, x, 1e-5, activation, False)
            batch_norm_act.sums(x, x, x, *known, x, partial, vector, 1e-5, activation)
            batch_norm_act.backward(x, x, x, *known, vector, x, 1e-5, activation)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
