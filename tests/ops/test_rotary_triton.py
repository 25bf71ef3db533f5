"""The Triton kernel of rotary: what Triton compiles it to, executed on the CPU (tests/cuda_on_cpu)."""

import dataclasses

import pytest
import torch
from ops.test_rotary import F16, F32, bound, tables

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import rotary as ops
from lspm_kernels.reference import rotary as reference

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import uninitialised

from lspm_kernels.triton import rotary

BF16 = torch.bfloat16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
# B, H, T, D, R, dtype, dtype of cos and sin
CASES = {
    "one pair": (1, 1, 1, 2, 2, F32, F32),
    "several heads": (2, 6, 5, 64, 64, BF16, F32),
    "dims passed through": (2, 3, 4, 80, 32, F16, F16),
    "odd dims": (1, 5, 3, 13, 6, BF16, BF16),
    "more heads than a tile has": (1, 40, 2, 64, 64, F32, F32),
    "more pairs than a tile has": (1, 2, 2, 1100, 1040, F16, F32),
}


class Rotary(torch.autograd.Function):
    """The kernel as a differentiable function of x."""

    @staticmethod
    def forward(ctx, x, cos, sin, offsets, offset, interleaved):
        ctx.rest = cos, sin, offsets
        ctx.flags = offset, interleaved
        return launched(rotary.forward, x, *ctx.rest, *ctx.flags)

    @staticmethod
    def backward(ctx, dout):
        return launched(rotary.backward, dout, *ctx.rest, *ctx.flags), *[None] * 5


def launched(launcher, x, cos, sin, offsets, offset, interleaved):
    B, H, T, D = x.shape
    out = uninitialised(torch.empty(B, T, H, D, dtype=x.dtype))
    launcher(x, cos, sin, offsets, out, offset, interleaved)
    return out.transpose(1, 2)


def ours(x, cos, sin, *, offsets=None, interleaved=False):
    many = isinstance(offsets, torch.Tensor)
    return Rotary.apply(x, cos, sin, offsets if many else None, 0 if many else offsets or 0, interleaved)


def check(case, view=lambda x: x, **options):
    B, H, T, D, R, dtype, table_dtype = CASES[case] if isinstance(case, str) else case
    cos_sin = tables(T + 9, R, table_dtype)
    forms = [bound(f, cos_sin, view, **options) for f in (ours, reference.rotary)]
    oracle.check(*forms, [torch.randn(B, H, T, D).to(dtype)])


# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(driver, name, interleaved):
    check(name, interleaved=interleaved)
    assert driver.launches == ["_rotary_kernel"] * 2


@on_one_gpu
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_offsets(driver, interleaved):
    for offsets in (7, torch.tensor([9, 2])):
        check("several heads", offsets=offsets, interleaved=interleaved)


@on_one_gpu
def test_strides(driver):
    check((2, 5, 3, 64, 64, BF16, F32), lambda x: x.transpose(1, 2))
    check((2, 3, 5, 65, 32, BF16, F32), lambda x: x[..., 1:])
    check((2, 1, 5, 16, 16, F32, F32), lambda x: x.expand(2, 3, 5, 16))


@on_one_gpu
def test_a_position_without_angles_becomes_nan(driver):
    x, (cos, sin) = torch.randn(2, 3, 2, 10), tables(6, 8)
    for offsets in ([-1, 0], [0, 5], [-(2**40), 2**40]):
        out = ours(x, cos, sin, offsets=torch.tensor(offsets))
        outside = [[not 0 <= o + t < 6 for t in range(2)] for o in offsets]
        assert torch.equal(out[..., :8].isnan(), torch.tensor(outside)[:, None, :, None].expand(2, 3, 2, 8))
        assert torch.equal(out[..., 8:], x[..., 8:])


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    x, (cos, sin) = torch.randn(2, 6, 3, 64).bfloat16(), tables(3, 64)
    results = []
    for driver.seed in range(3):
        results.append(ours(x, cos, sin))
    assert all(torch.equal(results[0], other) for other in results[1:])


@on_one_gpu
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_empty(driver, shape):
    check((*shape, 8, F32, F32))
    assert not driver.launches


@pytest.mark.parametrize(
    "sm", [90, *(pytest.param(sm, marks=pytest.mark.long) for sm in (80, 100))], ids="sm_{}".format
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dim, rotated", [(64, 64), (128, 128), (256, 64), (80, 20), (4096, 4096)])
def test_compiles_without_spills(sm, interleaved, dim, rotated):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype, table_dtype in [(F32, F32), (BF16, F32), (F16, F16)]:
            x = torch.randn(2, 32, 3, dim).to(dtype)
            for launcher in (rotary.forward, rotary.backward):
                launched(launcher, x, *tables(3, rotated, table_dtype), None, 0, interleaved)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
    if rotated % 32 == 0:
        assert not [r for r in driver.resources if r.conversions]


@on_one_gpu
def test_the_row_of_the_table_has_the_launchers_arguments(driver, monkeypatch):
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None)
    monkeypatch.setattr(ops, "BACKENDS", (here,))
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    cos_sin, offsets = tables(9, 16), torch.tensor([3, 0])
    forms = [bound(f, cos_sin, offsets=offsets) for f in (lk.rotary, reference.rotary)]
    oracle.check(*forms, [torch.randn(2, 3, 4, 16)])
    assert set(driver.launches) == {"_rotary_kernel"}
