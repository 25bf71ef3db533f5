"""The Triton kernels of mf_als and nmf, executed on the CPU, as rows of their ops' tables."""

import dataclasses

import pytest
import torch
from ops.matrices import matrix
from ops.test_mf_als import EXPLICIT, IMPLICIT, factors
from ops.test_mf_als import check as check_als
from ops.test_nmf import check as check_nmf

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import mf_als, nmf

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
CG = {"solver": "cg", "cg_steps": 3}
# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def rows_on_the_cpu(monkeypatch):
    """The ops run their Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    for op, table in ((mf_als, "BACKENDS"), (mf_als, "LOSS_BACKENDS"), (nmf, "BACKENDS")):
        row = next(row for row in getattr(op, table) if row.name == "triton")
        here = dataclasses.replace(row, device="cpu", missing=lambda: None)
        monkeypatch.setattr(op, table, (here,))


@on_one_gpu
def test_mf_als(driver):
    check_als(*factors(6, 20, 5), *matrix(6, 20, 150), weighted_reg=True, **CG, **IMPLICIT)
    assert driver.launches == ["_update_kernel"]


@pytest.mark.long
@pytest.mark.parametrize("k, options", [(5, EXPLICIT), (20, IMPLICIT), (64, IMPLICIT), (128, IMPLICIT)])
def test_mf_als_of_other_sizes(driver, k, options):
    check_als(*factors(6, 20, k), *matrix(6, 20, 150, wide=k == 5), weighted_reg=True, **CG, **options)


@on_one_gpu
def test_mf_als_loss(driver):
    given = *factors(6, 20, 5), *matrix(6, 20, 450)
    check_als(*given, weighted_reg=True, **IMPLICIT)
    assert driver.launches == ["_loss_kernel"]
    check_als(*given, torch.rand(450), **EXPLICIT)


@pytest.mark.long
@pytest.mark.parametrize("k, options", [(3, IMPLICIT), (20, EXPLICIT), (130, IMPLICIT), (1024, EXPLICIT)])
def test_mf_als_loss_of_other_sizes(driver, k, options):
    given = *factors(6, 20, k), *matrix(6, 20, 150, wide=k == 3)
    for weighted_reg in (False, 0.5):
        check_als(*given, weighted_reg=weighted_reg, **options)
    check_als(given[0][:0], given[1], given[2][:1], given[3][:0], given[4][:0], **options)


@on_one_gpu
def test_options_and_edges_of_mf_als(driver):
    (x, y), entries = factors(4, 20, 5), matrix(4, 20, 60)
    check_als(x, y, *entries, torch.rand(60), **CG, **EXPLICIT)
    empty = lk.mf_als_(x[:0], y, entries[0][:1], entries[1][:0], entries[2][:0], **CG, **EXPLICIT)
    assert empty.shape == (0, 5)
    solved = lk.mf_als_(x, y, *entries, solver="cg", cg_steps=8, reg=0.0)
    assert solved.isfinite().all() and not solved[-1].any()
    x, one_each = torch.randn(4, 5), (torch.arange(5), torch.arange(4), torch.ones(4))
    lacking = (1 - (x * y[:4]).sum(1)) / y[:4].square().sum(1)
    solved = lk.mf_als_(x.clone(), y, *one_each, solver="cg", cg_steps=60, reg=0.0)
    assert (solved - x - lacking[:, None] * y[:4]).abs().max() <= 0.01 * solved.abs().max()
    y[entries[1][0]] = float("nan")
    assert lk.mf_als_(x, y, *entries, **CG, **EXPLICIT)[0].isnan().all()


@on_one_gpu
def test_nmf(driver):
    check_nmf(torch.rand(6, 5), torch.rand(20, 5), *matrix(6, 20, 300))
    assert driver.launches == ["_update_kernel"]


@pytest.mark.long
@pytest.mark.parametrize("k", [5, 40, 300])
def test_nmf_of_other_sizes(driver, k):
    check_nmf(torch.rand(6, k), torch.rand(20, k), *matrix(6, 20, 300, wide=k == 5))


@on_one_gpu
def test_an_index_that_is_none_is_a_row_of_zeros(driver):
    """Under torch.compile nothing is checked until the kernel runs."""
    y, indptr, values = torch.rand(4, 5), torch.tensor([0, 3]), torch.rand(3)
    indices, zero = (torch.tensor([0, i, 2], dtype=torch.int32) for i in (2**31 - 1, 3))
    for call in (lambda x, y, i: lk.mf_als_(x, y, indptr, i, values, **CG, **EXPLICIT),
                 lambda x, y, i: lk.nmf_(x, y, indptr, i, values)):  # fmt: skip
        found = torch.compile(call, backend="eager")(torch.ones(1, 5), y, indices)
        named = y.clone()
        named[3] = 0
        assert torch.equal(found, call(torch.ones(1, 5), named, zero))
    loss = torch.compile(lambda x: lk.mf_als_loss(x, y, indptr, indices, values, **EXPLICIT), backend="eager")
    assert loss(torch.ones(1, 5)).isnan()


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    (x, y), entries = factors(5, 20, 5), matrix(5, 20, 300)
    results = []
    for driver.seed in range(3):
        solved = lk.mf_als_(x.clone(), y, *entries, **CG, **IMPLICIT)
        loss = lk.mf_als_loss(x, y, *entries, weighted_reg=True, **IMPLICIT)
        results.append([solved, loss, lk.nmf_(x.abs(), y.abs(), *entries)])
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_limits():
    x, y = factors(2, 3, 4)
    entries = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2)
    for message, k, solver in (
        ('solver="cg", got "cholesky"', 4, {}),
        ("K of at most 128, got 129", 129, CG),
    ):
        x, y = factors(2, 3, k)
        with pytest.raises(NotImplementedError, match=f"^mf_als_: triton needs {message}$"):
            lk.mf_als_(x, y, *entries, reg=1.0, backend="triton", **solver)
    wide = torch.rand(2, 1025), torch.rand(3, 1025), *entries
    with pytest.raises(NotImplementedError, match=r"^mf_als_loss: triton needs K of at most 1024, got 1025$"):
        lk.mf_als_loss(*wide, reg=1.0, backend="triton")
    with pytest.raises(NotImplementedError, match=r"^nmf_: triton needs K of at most 1024, got 1025$"):
        lk.nmf_(*wide, backend="triton")


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for k in (16, 64, 128):
            for options in (EXPLICIT, IMPLICIT):
                lk.mf_als_(*factors(2, 9, k), *matrix(2, 9, 20), **CG, **options)
                lk.mf_als_loss(*factors(2, 9, 8 * k), *matrix(2, 9, 20), **options)
        for k in (16, 64, 512, 1024):
            lk.nmf_(torch.rand(2, k), torch.rand(9, k), *matrix(2, 9, 20))
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
