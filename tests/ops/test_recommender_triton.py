"""The Triton kernels of mf and top_k_scores, executed on the CPU.

Each is run as a row of its op's table, so what an op hands to its kernels is tested too.
"""

import dataclasses

import pytest
import torch
from ops.test_mf import EMPTY, SHAPES, bound, check, pairs, tables
from ops.test_top_k_scores import exclusions, identical, integers

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import mf, top_k_scores
from lspm_kernels.reference import top_k_scores as reference

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import unwritten

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OUTPUTS = {mf: {"forward": (6,), "backward": (5, 6, 7, 8)}, top_k_scores: {"forward": (5, 6)}}
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def rows_on_the_cpu(monkeypatch):
    """The ops run their Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    for op, outputs in OUTPUTS.items():
        row = next(row for row in op.BACKENDS if row.name == "triton")
        kernels = {way: unwritten(getattr(row, way), places) for way, places in outputs.items()}
        here = dataclasses.replace(row, device="cpu", missing=lambda: None, **kernels)
        monkeypatch.setattr(op, "BACKENDS", (here,))


def check_mf(dtype):
    for shape in (SHAPES[1], (60, 4, 50, 33)):
        check(shape, dtype)
        check(shape, dtype, biased=False)


@on_one_gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_mf(driver, dtype):
    check_mf(dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_mf_of_every_dtype(driver, dtype):
    check_mf(dtype)


@on_one_gpu
def test_more_factors_than_a_tile_and_nothing_at_all(driver):
    check((5, 3, 300, 100), F32)
    for shape in EMPTY:
        check(shape, F32)


@on_one_gpu
def test_an_id_that_is_none_reads_nothing_and_makes_nan(driver):
    u, i, *_ = (t.requires_grad_() for t in tables((4, 5, 6, 0), F32))
    users, items = torch.tensor([0, 4, 1, -1, 2]), torch.tensor([1, 2, 2**40, 3, 4])
    ratings = lk.mf(u, i, users, items)
    assert ratings.isnan().tolist() == [False, True, True, True, False]
    gradients = torch.autograd.grad(ratings, [u, i], torch.ones(5))
    assert gradients[0].isnan().all(1).tolist() == [False, True, False, False]
    assert gradients[1].isnan().all(1).tolist() == [False, False, True, True, False]
    assert not gradients[0][3].any()


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    shape = (7, 5, 20, 90)
    ids, tensors = pairs(shape), tables(shape, BF16)
    results = []
    for driver.seed in range(3):
        results.append(list(oracle.outputs_and_gradients(bound(lk.mf, *ids), tensors).values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def check_best(dtype, shape, excluded=True, special=False):
    B, N, D, k = shape
    q, i, bias = integers((B, D), dtype), integers((N, D), dtype), integers((N,), F32)
    if special:
        i[3, 0] = i[N - 1, 1] = float("nan")
        bias[[1, 4]] = torch.tensor([float("inf"), -float("inf")])
    lists = exclusions(B, N, 30, torch.int32) if excluded else (None, None)
    ours = lk.top_k_scores(q, i, k, item_bias=bias, exclude_indptr=lists[0], exclude_indices=lists[1])
    identical(ours, reference.top_k_scores(q, i, k, bias, *lists))


@on_one_gpu
def test_top_k_scores(driver):
    for driver.seed in range(2):  # under another schedule too
        check_best(F32, (17, 90, 70, 5))
        check_best(F32, (2, 10, 3, 13), special=True)  # fewer items than k, more lanes than items


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_top_k_scores_of_every_kind(driver, dtype):
    for shape in ((17, 90, 70, 5), (3, 20, 7, 30), (2, 300, 5, 64), (2, 0, 3, 2), (2, 5, 0, 2), (0, 5, 3, 2)):
        check_best(dtype, shape)
        check_best(dtype, shape, excluded=False, special=shape[1] > 5 and shape[2] > 2)


def test_a_k_that_is_too_large():
    with pytest.raises(NotImplementedError, match="top_k_scores: triton needs k of at most 64, got 65"):
        lk.top_k_scores(torch.ones(1, 2), torch.ones(3, 2), 65, backend="triton")


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype in (F32, BF16, F16):
            for dim in (16, 50, 64, 300):
                u, i, a, b = (t.requires_grad_() for t in tables((9, 9, dim, 0), dtype))
                ids = pairs((9, 9, dim, 100))
                lk.mf(u, i, *ids, user_bias=a, item_bias=b).sum().backward()
                lk.mf(u, i, *ids).sum().backward()
            for k in (10, 64):
                q, i = torch.randn(3, 70).to(dtype), torch.randn(200, 70).to(dtype)
                lists = dict(zip(("exclude_indptr", "exclude_indices"), exclusions(3, 200, 30), strict=True))
                lk.top_k_scores(q, i, k, item_bias=i[:, 0], **lists)
                lk.top_k_scores(q, i, k)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
