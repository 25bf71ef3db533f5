"""The Triton kernel of dropout, as Triton compiles them, executed on the CPU (cuda_on_cpu)."""

import dataclasses

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import dropout as ops
from lspm_kernels.reference import dropout as reference

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

_, BF16, _ = DTYPES = torch.float32, torch.bfloat16, torch.float16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)
ON_CPU = ops.BACKENDS[0]


@pytest.fixture(autouse=True)
def row_on_the_cpu(monkeypatch):
    """The op runs its Triton kernel, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(
        row, device="cpu", missing=lambda: None, forward=triton_driver.unwritten(row.forward, (2,))
    )
    monkeypatch.setattr(ops, "BACKENDS", (here,))


def check(x, residual, p, seed=5):
    def bound(f):
        return lambda x, r: f(x, p, residual=r, seed=seed)

    oracle.check(bound(lk.dropout), bound(reference.dropout), [x, residual])
    on_cpu = torch.empty_like(x)
    ON_CPU.forward(x, residual, on_cpu, p, ops.scale_of(p), seed)
    assert torch.equal(lk.dropout(x, p, residual=residual, seed=seed), on_cpu)


@on_one_gpu
def test_the_same_bits_as_the_cpus(driver):
    x, residual = torch.randn(2, 3, 1100).unbind()
    check(x, residual, 0.3)
    check(x.to(BF16), None, 0.75, seed=2**63 - 1)
    assert set(driver.launches) == {"_forward_kernel"}


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(driver, dtype):
    x, residual = torch.randn(2, 3, 1100).to(dtype).unbind()
    check(x, residual, 0.3)
    check(x, None, 0.75, seed=2**63 - 1)


@on_one_gpu
def test_small_sizes_and_both_ends_of_p(driver):
    for size in (1, 63, 1024, 1025):
        check(torch.randn(size), None, 0.5)
    check(torch.randn(70), torch.randn(70), 1.0)
    assert torch.equal(lk.dropout(torch.full((70,), float("nan")), 1.0, seed=1), torch.zeros(70))


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    x, results = torch.randn(3000), []
    for driver.seed in range(3):
        results.append(lk.dropout(x, 0.3, residual=x, seed=1))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.long) for sm in (80, 100))])
def test_compiles_without_spills(sm):
    from lspm_kernels.triton import dropout

    with triton_driver.activated(sm, execute=False) as compiling:
        for dtype in DTYPES[:2]:
            x = torch.empty(4096, dtype=dtype)
            for residual in (None, x):
                dropout.forward(x, residual, x, 0.1, 1 / 0.9, 3)
    assert compiling.resources
    assert not [r for r in compiling.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
