"""The Triton kernels of layer norm: what Triton compiles them to, executed on the CPU (tests/cuda_on_cpu)."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from ops.norms import ALL, EPS, plain, tensors

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import layer_norm as ops

triton = pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver  # noqa: E402
from cuda_on_cpu.triton_driver import uninitialised  # noqa: E402

from lspm_kernels.triton import layer_norm  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
TILE = ["_forward_kernel", "_backward_kernel", "_sum_partials_kernel"]
WIDE = ["_wide_forward_kernel", "_wide_dx_kernel", "_wide_partial_kernel", "_sum_partials_kernel"]
# rows, cols, dtype, weight_dtype, centered, what is present, the kernels launched
CASES = {
    "one row a program": (5, 768, F32, F32, True, ALL, TILE),
    "several rows a program": (37, 96, BF16, F32, False, ("residual", "weight"), TILE),
    "lengths that are no multiple of 16": (21, 129, BF16, BF16, True, ALL, TILE),
    "one column": (9, 1, F32, F32, True, ("weight", "bias"), TILE),
    "neither weight nor bias": (6, 64, F16, F16, False, (), TILE[:2]),
    "no weight": (21, 20, F32, F32, True, ("residual", "bias"), TILE),
    "wide": (3, 8256, F16, F16, True, ALL, WIDE),
    "wide, no multiple of 16": (2, 2050, F32, F32, False, ("weight",), WIDE),
}


class LayerNorm:
    """The kernels as a differentiable function of x, residual, weight, bias."""

    def __init__(self, centered=True, partials=3, weight_gradients=True):
        self.centered, self.partials, self.weight_gradients = centered, partials, weight_gradients

    def __call__(self, x, residual=None, weight=None, bias=None):
        y, total = LayerNormFunction.apply(self, x, residual, weight, bias)
        return y if residual is None else (y, total)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, x, residual, weight, bias):
        y, total = empty_like(x), None if residual is None else empty_like(x)
        statistics = empty(2 if op.centered else 1, x.shape[0])
        layer_norm.forward(x, residual, weight, bias, total, y, statistics, EPS, op.centered)
        total = x.clone() if total is None else total
        ctx.op, ctx.summed = op, residual is not None
        ctx.save_for_backward(total, statistics, weight, bias)
        return y, total

    @staticmethod
    def backward(ctx, dy, dsum):
        op = ctx.op
        total, statistics, weight, bias = ctx.saved_tensors
        dx = empty_like(dy)
        wanted = op.weight_gradients
        dweight, dbias = (empty_like(t) if wanted and t is not None else None for t in (weight, bias))
        partial = empty(op.partials, 2, dy.shape[1]) if wanted else None
        dsum = dsum if ctx.summed else None
        layer_norm.backward(dy, dsum, total, statistics, weight, dx, dweight, dbias, partial, op.centered)
        return None, dx, dx if ctx.summed else None, dweight, dbias


def empty(*shape):
    return uninitialised(torch.empty(shape))


def empty_like(tensor):
    return uninitialised(torch.empty_like(tensor))


# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(driver, name):
    rows, cols, dtype, weight_dtype, centered, present, kernels = CASES[name]
    inputs = tensors(rows, cols, dtype, weight_dtype, present)
    oracle.check(LayerNorm(centered), plain(centered), inputs)
    assert driver.launches == kernels


@on_one_gpu
@pytest.mark.parametrize("cols", [64, 8256])
def test_data_gradient_alone(driver, cols):
    x, residual, weight, bias = tensors(6, cols)
    op = LayerNorm(weight_gradients=False)
    same = [t.double().to(t.dtype) for t in (weight, bias)]
    oracle.check(
        lambda x, r: op(x, r, weight, bias),
        lambda x, r: plain()(x, r, *(t.to(x.dtype) for t in same)),
        [x, residual],
    )
    assert not {"_wide_partial_kernel", "_sum_partials_kernel"} & set(driver.launches)


@on_one_gpu
@pytest.mark.parametrize("cols", [96, 2050])
@pytest.mark.parametrize("rows, partials", [(2, 5), (7, 4), (9, 1), (40, 33)])
def test_partial_sums_are_those_of_consecutive_rows(driver, rows, partials, cols):
    x, _, weight, _ = tensors(rows, cols)
    dy = torch.randn(rows, cols)
    mean, rstd = x.mean(1), (x.var(1, unbiased=False) + EPS).rsqrt()
    dx, dweight, dbias, partial = empty(rows, cols), empty(cols), empty(cols), empty(partials, 2, cols)
    layer_norm.backward(dy, None, x, torch.stack((mean, rstd)), weight, dx, dweight, dbias, partial, True)
    rows_per_run = -(-rows // partials)
    expected = torch.zeros(partials, 2, cols)
    for row in range(rows):
        expected[row // rows_per_run] += torch.stack((dy[row] * (x[row] - mean[row]) * rstd[row], dy[row]))
    torch.testing.assert_close(partial, expected)
    torch.testing.assert_close(torch.stack((dweight, dbias)), expected.sum(0))


@on_one_gpu
@pytest.mark.parametrize("cols", [96, 8256])
def test_the_norm_is_of_the_rounded_sum(driver, cols):
    x, residual, weight, bias = tensors(3, cols, F16, F16)
    y, total = LayerNorm()(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert torch.equal(LayerNorm()(total, None, weight, bias), y)


@on_one_gpu
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty(driver, shape):
    oracle.check(LayerNorm(), plain(), tensors(*shape))
    assert not driver.launches


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    inputs = tensors(37, 96, BF16, F32)
    results = []
    for seed in range(3):
        driver.seed = seed
        results.append(oracle.outputs_and_gradients(LayerNorm(), inputs))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@on_one_gpu
def test_misaligned_tensors(driver):
    inputs = [torch.cat((t.view(-1)[:1], t.view(-1)))[1:].view(t.shape) for t in tensors(3, 4096)]
    assert all(t.data_ptr() % 16 for t in inputs)
    oracle.check(LayerNorm(), plain(), inputs)
    assert driver.launches == WIDE


@on_one_gpu
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, 1e-30, 0.0])
def test_special_values(driver, value):
    x, _, weight, bias = tensors(9, 96)
    x[1, 7] = value
    x[2] = value
    oracle.check(LayerNorm(), plain(), [x, None, weight, bias], gradients=False)


@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize(
    "cols",
    [63, 768, 8192, 16384, *(pytest.param(cols, marks=pytest.mark.long) for cols in (64, 767, 4096, 5000))],
)
def test_compiles_without_spills(sm, cols):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype, weight_dtype, centered in [(F32, F32, True), (BF16, F32, True), (BF16, BF16, False)]:
            present = ALL if centered else ("residual", "weight")
            inputs = tensors(4, cols, dtype, weight_dtype, present)
            y, total = LayerNorm(centered)(inputs[0].requires_grad_(), *inputs[1:])
            torch.autograd.grad((y, total), inputs[0], (y, total))
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
    if cols % 16 == 0:
        assert not [r for r in driver.resources if r.conversions]


@on_one_gpu
def test_the_row_of_the_table_has_the_launchers_arguments(driver, monkeypatch):
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None)
    monkeypatch.setattr(ops, "BACKENDS", (here,))
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    oracle.check(lk.add_layer_norm, plain(), tensors(6, 64))
    oracle.check(
        lambda x, w: lk.rms_norm(x, w, EPS), lambda x, w: plain(False)(x, None, w), tensors(6, 64)[::2]
    )
    assert set(driver.launches) == set(TILE)


def test_the_driver_is_restored():
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), triton_driver.activated(80):
        1 / 0  # noqa: B018
    assert triton.runtime.driver._active is before


def test_triton_is_imported_only_when_needed():
    check = "import sys, lspm_kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
    check = "import sys, lspm_kernels.triton; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
