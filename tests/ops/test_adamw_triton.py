"""The Triton kernels of adamw, executed on the CPU (tests/cuda_on_cpu), as rows of the op's tables."""

import dataclasses

import pytest
import torch
from ops import test_adamw as on_cpu
from ops.test_adamw import BF16, FEW, KINDS, NUMBERS, made

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import adamw as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

from lspm_kernels.triton import adamw as kernels

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
LARGE = [(5,), (16_384 + 1025,), (0,), (16_384,), (3, 7)]  # more than a chunk, and one as long
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def rows_on_the_cpu(monkeypatch):
    """The ops run their Triton kernels on CPU tensors, whose addresses the emulated GPU translates."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    for table in ("BACKENDS", "NORM_BACKENDS"):
        row = next(row for row in getattr(ops, table) if row.name == "triton")
        monkeypatch.setattr(ops, table, (dataclasses.replace(row, device="cpu", missing=lambda: None),))
    of_addresses = kernels.table_of

    def table_of(lists):
        table = of_addresses(lists)
        table.addresses_of = [t for tensors in lists for t in tensors]
        return table

    monkeypatch.setattr(kernels, "table_of", table_of)


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(driver, kind):
    on_cpu.check(kind, steps=1, scale=0.3)
    on_cpu.check(kind, LARGE, amsgrad=True, steps=1, maximize=True, weight_decay=0.0)
    assert driver.launches == ["_update_kernel"] * 2


@on_one_gpu
def test_addresses_that_suit_no_wide_load(driver):
    lists, (grads,) = made("float32", [(1030,), (2500,)])
    room = torch.randn(1031)
    shifted = room[1:].copy_(lists[0][0])
    expected = [t.clone() for t in lists[0]]
    states, others = ([[t.clone() for t in tensors] for tensors in lists[1:3]] for _ in range(2))
    lk.adamw_([shifted, lists[0][1]], grads, *states, step=2, **NUMBERS)
    lk.adamw_(expected, grads, *others, step=2, **NUMBERS)
    assert torch.equal(shifted, expected[0]) and all(map(torch.equal, states[0], others[0]))


def test_norm(driver):
    for dtype in on_cpu.DTYPES:
        grads = [torch.randn(s).to(dtype) for s in LARGE]
        truth = sum(g.double().square().sum() for g in grads).sqrt().float()
        assert torch.equal(lk.adamw_norm(grads), truth)
    assert driver.launches == ["_norm_kernel"] * 3
    assert lk.adamw_norm(torch.zeros(0)) == 0
    on_cpu.test_norm_of_what_is_large_small_or_not_finite(1e30)


@on_one_gpu
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-40])
def test_special_values(driver, value):
    on_cpu.test_special_values_stay_in_their_elements(value)
    on_cpu.test_amsgrad_keeps_a_nan()


def test_stochastic_rounding_draws_what_the_cpu_draws(driver):
    on_cpu.test_stochastic_rounding_takes_its_words_of_philox()


@on_one_gpu
def test_layouts_one_tensor_and_nothing_at_all(driver):
    on_cpu.test_layouts()
    on_cpu.test_one_tensor_and_steps_of_each()


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    lists, (grads,) = made("bfloat16, wide state", LARGE)
    results = []
    for driver.seed in range(3):
        copies = [[t.clone() for t in tensors] for tensors in lists[:3]]
        params, first, second = copies
        lk.adamw_(params, grads, first, second, step=3, stochastic_rounding=True, seed=5)
        results.append([*(t for tensors in copies for t in tensors), lk.adamw_norm(grads)])
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for kind, (dtype, _, master) in KINDS.items():
            for amsgrad in (False, True):
                (params, first, second, most, masters), (grads,) = made(kind, FEW, amsgrad)
                options = {"stochastic_rounding": dtype == BF16 and not master}
                options |= {"step": 1, "master_params": masters or None}
                lk.adamw_(params, grads, first, second, most or None, **options)
                lk.adamw_norm(grads)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
