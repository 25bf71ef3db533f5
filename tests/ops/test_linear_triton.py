"""The Triton kernel of linear, executed on the CPU as a row of its table."""

import dataclasses

import pytest
import torch
from ops.test_linear import BF16, DTYPES, F16, F32, check, integers

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import linear as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import unwritten

# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched


@pytest.fixture(autouse=True)
def row_on_the_cpu(monkeypatch):
    """The op runs its Triton kernel, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=unwritten(row.forward, (4,)))
    monkeypatch.setattr(ops, "BACKENDS", (here,))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 5, 33), (3, 40, 200)])
def test_against_the_reference(driver, rows, outputs, inputs, dtype):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    check(x, weight, torch.randn(outputs).to(dtype))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_many_rows_as_it_takes(driver, dtype):
    x, weight = torch.randn(ops.MOST_ROWS, 300).to(dtype), torch.randn(16, 300).to(dtype)
    check(x, weight, None)


@on_one_gpu
@pytest.mark.parametrize(("inputs", "groups", "dtype"), [(70, 1, BF16), (96, 3, F32), (384, 2, F16)])
def test_integers(driver, inputs, groups, dtype):
    weight, scales = integers(21, inputs, groups)
    check(torch.randn(2, inputs).to(dtype), weight, torch.randn(21), scales)


@on_one_gpu
def test_a_weight_of_another_type_and_strides(driver):
    wide = torch.randn(20, 300)
    for other in (F32, BF16):
        check(torch.randn(1, 100), wide.to(other)[:, 150:250], None)


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype in DTYPES:
            x = torch.randn(8, 256).to(dtype)
            lk.linear(x, torch.randn(32, 256).to(dtype), torch.randn(32))
            for groups in (1, 2):
                weight, scales = integers(32, 256, groups)
                lk.linear(x, weight, scales=scales)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
