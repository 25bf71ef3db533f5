"""The Triton kernels of bias_act and swiglu, as Triton compiles them, executed on the CPU (cuda_on_cpu)."""

import dataclasses

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import bias_act, swiglu
from lspm_kernels.reference import bias_act as bias_act_reference
from lspm_kernels.reference import mlp as mlp_reference
from lspm_kernels.reference import swiglu as swiglu_reference

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
WITH_BIAS = ["_forward_kernel", "_backward_kernel", "_sum_runs_kernel"]
# rows, cols, dtype, dtype of the bias or None, activation
ACTS = {
    "whole tiles": (64, 256, F32, F32, "gelu"),
    "several runs, rows that fill no tile": (75, 40, BF16, BF16, "gelu_tanh"),
    "several blocks of columns": (7, 300, F16, F32, "silu"),
    "one column": (70, 1, F32, F32, "relu"),
    "no bias": (33, 129, BF16, None, "gelu"),
}
GLUS = {
    "whole tiles": (32, 128, F32, "silu", True),
    "packed": (9, 200, BF16, "silu", False),
    "odd columns, packed": (5, 37, F16, "gelu", False),
    "several blocks of columns": (3, 300, BF16, "gelu_tanh", True),
}


@pytest.fixture
def here(driver, monkeypatch):
    """The driver, with the rows of the tables that say triton taking tensors on the CPU."""
    for ops in (bias_act, swiglu):
        row = next(row for row in ops.BACKENDS if row.name == "triton")
        monkeypatch.setattr(ops, "BACKENDS", (dataclasses.replace(row, device="cpu", missing=lambda: None),))
    monkeypatch.setattr(lk.ops.mlp, "BACKENDS", bias_act.BACKENDS)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    monkeypatch.setattr(bias_act, "_RUNS", {"cpu": 3})
    return driver


# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


def check_act(inputs, activation, **options):
    ours, theirs = (lambda *t, f=f: f(*t, activation) for f in (lk.bias_act, bias_act_reference.bias_act))
    oracle.check(ours, theirs, inputs, **options)


def check_glu(inputs, activation, laid=lambda *t: t):
    def ours(*t):
        if activation == "silu":
            return lk.swiglu(*laid(*t))
        return lk.geglu(*laid(*t), approximate="tanh" if activation == "gelu_tanh" else "none")

    def theirs(gate, up=None):
        given = laid(gate) if up is None else laid(gate, up)
        return swiglu_reference.swiglu(given[0], given[1] if len(given) > 1 else None, activation)

    oracle.check(ours, theirs, inputs)


@on_one_gpu
@pytest.mark.parametrize("name", ACTS)
def test_bias_act_against_the_reference(here, name):
    rows, cols, dtype, bias_dtype, activation = ACTS[name]
    bias = None if bias_dtype is None else torch.randn(cols).to(bias_dtype)
    check_act([torch.randn(rows, cols).to(dtype), bias], activation)
    assert here.launches == (WITH_BIAS[:2] if bias is None else WITH_BIAS)


@on_one_gpu
@pytest.mark.parametrize("name", GLUS)
def test_swiglu_against_the_reference(here, name):
    rows, cols, dtype, activation, apart = GLUS[name]
    halves = torch.randn(2, rows, cols).to(dtype).unbind()
    check_glu(list(halves) if apart else [torch.cat(halves, -1)], activation)
    assert here.launches == ["_forward_kernel", "_backward_kernel"]


@on_one_gpu
def test_views_of_packed_rows(here):
    check_glu([torch.randn(2, 5, 80)], "silu", laid=lambda t: (t[..., 3:40], t[..., 41:78]))
    check_glu([torch.randn(6, 100)], "silu", laid=lambda t: (t[:, 10:90],))


@on_one_gpu
def test_mlps(here):
    x, weight, bias = torch.randn(9, 16), torch.randn(24, 16) / 4, torch.randn(24)
    oracle.check(lk.mlp, mlp_reference.mlp, [x, weight, bias, weight.t() / 4, torch.randn(16)])
    oracle.check(lk.gated_mlp, mlp_reference.gated_mlp, [x, weight, weight.flip(0), weight.t() / 4])
    again = torch.ops.lspm.bias_act_backward(x, x, bias[:16], 4, True, True, False, "cpu")[2]
    oracle.check(
        lambda x: again + 0 * x, lambda x: bias_act_reference.bias_act(x, bias[:16]), [x], gradients=False
    )


@on_one_gpu
@pytest.mark.parametrize("activation", bias_act.ACTIVATIONS)
def test_special_values(here, activation):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e15, -1e15, 1e-30, 0.0, -9.0]])
    actual = oracle.outputs_and_gradients(lambda x: lk.bias_act(x, None, activation), [x])
    truth = oracle.outputs_and_gradients(
        lambda x: bias_act_reference.bias_act(x, None, activation), [x.double()]
    )
    for name, t in truth.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual[name]), kind(t)), (name, kind)


@on_one_gpu
def test_same_bits_under_any_schedule(here):
    inputs = [torch.randn(75, 40).to(BF16), torch.randn(40)]
    results = []
    for seed in range(3):
        here.seed = seed
        results.append(oracle.outputs_and_gradients(lk.bias_act, inputs))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("sm", [80, 90, pytest.param(100, marks=pytest.mark.long)], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    from lspm_kernels.triton import bias_act, swiglu

    with triton_driver.activated(sm, execute=False) as driver:
        for cols, dtype, activation in [(64, F32, 4), (256, BF16, 5), (37, F16, 3)]:
            x, vector, partial = torch.empty(8, cols, dtype=dtype), torch.empty(cols), torch.empty(2, cols)
            bias_act.forward(x, vector, x, activation)
            bias_act.backward(x, x, vector, x, vector, x, partial, activation)
            swiglu.forward(x, x, x, activation)
            swiglu.backward(x, x, x, x, x, x, activation)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
