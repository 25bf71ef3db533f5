"""The Triton kernels of attention: what Triton compiles them to, executed on the CPU (tests/cuda_on_cpu)."""

import dataclasses

import pytest
import torch
from ops import test_attention_options

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import attention as ops
from lspm_kernels.reference import attention as reference
from lspm_kernels.reference import philox

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import uninitialised

from lspm_kernels.triton import attention, attention_tiles
from lspm_kernels.triton.attention_tiles import Tile

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
# Tiles that run in seconds here: on sm_80 not square, so that no size stands for another, and on sm_90 as
# wide as wgmma is.
SMALL = {80: Tile(32, 16, 2, 2), 90: Tile(64, 64, 4, 2)}
FORWARD, BACKWARD = ["_forward_kernel"], ["_dots_kernel", "_dkdv_kernel", "_dq_kernel"]
# B, H, H_kv, T_q, T_k, D, Dv
SHAPES = {
    "small": (2, 4, 2, 37, 50, 16, 24),
    "more queries than keys": (1, 2, 2, 70, 21, 16, 16),
    "long": (1, 2, 1, 100, 130, 16, 16),
    "wide": (1, 2, 1, 70, 90, 64, 32),
    "table": (1, 2, 1, 150, 150, 64, 64),
    "odd dims": (2, 2, 1, 20, 33, 7, 20),
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "decoding": (2, 2, 1, 1, 40, 16, 16),
    "no keys": (1, 2, 1, 5, 0, 16, 16),
}
EVERYTHING = {
    "bias": (2, 2, 1, 1), "mask": (2, 0, 0, 1), "slopes": 1, "softcap": 5.0, "dropout_p": 0.2, "seed": 3,
    "sinks": True, "window": (40, 20), "scale": 0.3, "return_lse": True,
}  # fmt: skip
# shape, dtype, options: those of lk.attention, with the kind of a tensor for the tensor
CASES = {
    "plain": ("small", F32, {}),
    "16 bits": ("wide", BF16, {"causal": True}),
    "half": ("more queries than keys", F16, {"causal": True, "scale": -0.4}),
    "odd dims": ("odd dims", F32, {"causal": True}),
    "odd dims of 16 bits": ("odd dims", BF16, {}),
    "one element": ("one element", F32, {}),
    "decoding": ("decoding", F32, {"window": (30, None)}),
    "no keys": ("no keys", F32, {"sinks": True, "return_lse": True}),
    "window": ("long", F32, {"window": (33, 7)}),
    "window to the left": ("long", BF16, {"window": (20, None)}),
    "top-left causal": ("small", F32, {"causal": True, "top_left": True, "return_lse": True}),
    "bias": ("small", F32, {"bias": (2, 2, 1, 1)}),
    "bias of a head": ("small", BF16, {"bias": (0, 2, 1, 1), "causal": True}),
    "bias of a row": ("small", F32, {"bias": (2, 0, 1, 0), "return_lse": True}),
    "bias of a key": ("more queries than keys", F32, {"bias": (2, 0, 0, 1), "window": (9, 30)}),
    "mask": ("small", F32, {"mask": (2, 0, 1, 1), "return_lse": True}),
    "added mask": ("small", F32, {"added": (0, 2, 1, 1)}),
    "slopes": ("small", F32, {"slopes": 2, "causal": True}),
    "softcap": ("small", F32, {"softcap": 2.0, "bias": (0, 0, 1, 1)}),
    "dropout": ("long", F32, {"dropout_p": 0.3, "seed": 2**62 + 12345}),
    "sinks": ("more queries than keys", F32, {"sinks": True, "causal": True, "return_lse": True}),
    "everything": ("long", F32, EVERYTHING),
}
# Their parts are in others, above all in "everything"; to translate each kernel anew takes six seconds.
LONG = {
    "odd dims of 16 bits",
    "bias of a head",
    "bias of a row",
    "bias of a key",
    "added mask",
    "slopes",
    "softcap",
}
# The other code generator: wgmma, where a tile has 64 rows and a program 4 warps.
ON_SM_90 = [
    "16 bits",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("half", "window", "everything")),
]


def case(shape, dtype, options):
    """The tensors that get a gradient, and a function of (attention, *tensors)."""
    given, plain = test_attention_options.case(options, SHAPES[shape], dtype)

    def call(f, *t):
        found = plain(f, *t)
        if isinstance(found, tuple):  # where no key is seen, lse has no gradient
            assert not found[1].isnan().any()
            return found[0], torch.where(found[1].isfinite(), found[1], 0.0)
        return found

    return given, call


def check(shape, dtype, options):
    given, call = case(shape, dtype, options)
    oracle.check(*(lambda *t, f=f: call(f, *t) for f in (lk.attention, reference.attention)), given)


def forward(q, k, v, bias, mask, slopes, sinks, out, lse, statistics, *rest):
    outputs = map(uninitialised, (out, lse, statistics))
    attention.forward(q, k, v, bias, mask, slopes, sinks, *outputs, *rest)


def backward(*given):
    *inputs, dq, dk, dv, dbias, delta, sequences, window, scalars = given
    outputs = map(uninitialised, (dq, dk, dv))
    attention.backward(*inputs, *outputs, dbias, uninitialised(delta), sequences, window, scalars)


@pytest.fixture
def table(monkeypatch):
    """The op's table has the Triton row alone, for tensors on the CPU."""
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=forward, backward=backward)
    monkeypatch.setattr(ops, "BACKENDS", (here,))
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was


on_sm_80 = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)
on_sm_90 = pytest.mark.parametrize("gpu", [90], ids=["sm_90"], indirect=True)


@pytest.fixture
def driver(driver, table, monkeypatch):
    monkeypatch.setattr(attention, "_tile", lambda *_: SMALL[driver.sm])
    return driver


@on_sm_80
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in CASES]
)
def test_against_the_reference(driver, name):
    check(*CASES[name])


@on_sm_90
@pytest.mark.parametrize("name", ON_SM_90)
def test_against_the_reference_with_wgmma(driver, name):
    check(*CASES[name])


@pytest.mark.long
def test_a_tile_of_the_table(gpu, table):
    check("table", BF16, {"causal": True})
    assert not gpu.lint


@on_sm_80
def test_the_kernels_of_a_call(driver):
    given, call = case("small", F32, {"bias": (2, 0, 1, 1)})
    call(lk.attention, *given)
    assert driver.launches == FORWARD
    q, *rest = given
    call(lk.attention, q.requires_grad_(), *rest).sum().backward()
    assert driver.launches[1:] == FORWARD + BACKWARD
    call(lk.attention, q, *rest[:-1], rest[-1].requires_grad_()).sum().backward()
    assert driver.launches[5:] == [*FORWARD, *BACKWARD, "_dbias_kernel"]


@on_sm_80
@pytest.mark.parametrize(
    "size, view",
    [
        ((2, 40, 3, 4, 16), lambda qkv: qkv.permute(2, 0, 3, 1, 4)),
        ((3, 2, 4, 80, 17), lambda qkv: qkv[:, :, :, ::2, 1:]),
        ((3, 1, 1, 40, 16), lambda qkv: qkv.expand(3, 2, 4, 40, 16)),
    ],
    ids=["packed projection", "misaligned rows apart", "expanded"],
)
def test_strides(driver, size, view):
    forms = (lambda t, f=f: f(*view(t), causal=True) for f in (lk.attention, reference.attention))
    oracle.check(*forms, [torch.randn(size)])


@on_sm_80
def test_strides_of_what_is_added(driver):
    q, k, v = torch.randn(3, 2, 2, 20, 16)
    bias, mask = torch.randn(2, 20, 2, 40), torch.rand(20, 20) < 0.7
    added = {"mask": mask.T}
    forms = (
        lambda q, k, v, b, f=f: f(q, k, v, bias=b.transpose(1, 2)[..., ::2].transpose(2, 3), **added)
        for f in (lk.attention, reference.attention)
    )
    oracle.check(*forms, [q, k, v, bias])


@on_sm_80
def test_tiles_outside_the_window_are_not_read(driver):
    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    # Queries 32 to 63 see keys 24 to 63; tiles of 16 keys reach from 16 to 63, those of 32 queries to 95.
    far = torch.ones(128, dtype=torch.bool)
    far[16:64] = False
    poisoned = [x.clone().requires_grad_() for x in (q, k, v)]
    for x in poisoned[1:]:
        x.data[:, :, far] = float("nan")
    out = lk.attention(*poisoned, window=(8, 0))
    assert out[:, :, 32:64].isfinite().all()
    out[:, :, 32:64].sum().backward()
    assert poisoned[0].grad[:, :, 32:64].isfinite().all()

    poisoned = [x.clone().requires_grad_() for x in (q, k, v)]
    poisoned[0].data[:, :, 96:] = float("nan")  # keys up to 63 are seen by queries up to 71
    lk.attention(*poisoned, window=(8, 0)).sum().backward()
    for x in poisoned[1:]:
        assert x.grad[:, :, :80].isfinite().all() and x.grad[:, :, 96:].isnan().all()


@triton.jit
def _kept_kernel(out, seed, threshold, M: tl.constexpr, N: tl.constexpr):
    first = tl.program_id(0) * N
    kept = attention_tiles.kept(1, 2, 32, first, seed, threshold, M, N)
    at = tl.arange(0, M)[:, None] * tl.num_programs(0) * N + first + tl.arange(0, N)[None, :]
    tl.store(out + at, kept.to(tl.int8))


@on_sm_80
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_dropout_keeps_the_same_elements_whatever_the_tile(driver, columns):
    seed, p, M, keys = 2**62 + 12345, 0.3, 16, 256
    out = uninitialised(torch.empty(M, keys, dtype=torch.int8))
    _kept_kernel[(keys // columns,)](out, seed, int(p * 2**32), M, columns)
    expected = philox.kept(seed, p, range(1, 2), 3, 32 + M, keys, out.device)[0, 2, 32:]
    assert torch.equal(out.bool(), expected)


@on_sm_80
@pytest.mark.parametrize("hiding", ["causal", pytest.param("bias", marks=pytest.mark.long)])
def test_a_query_that_sees_no_key(driver, hiding):
    given, _ = case("more queries than keys", F32, {})
    q, k, v = (x.requires_grad_() for x in given)
    added = torch.zeros(q.shape[2], k.shape[2]).index_fill_(0, torch.arange(49), -torch.inf)
    hides = {"causal": True} if hiding == "causal" else {"bias": added}
    out, lse = lk.attention(q, k, v, **hides, return_lse=True)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert (out[:, :, :49] == 0).all() and (dq[:, :, :49] == 0).all()
    assert (lse[:, :, :49] == -torch.inf).all() and lse[:, :, 49:].isfinite().all()


@on_sm_80
@pytest.mark.parametrize("name", ["16 bits", "everything"])
def test_same_bits_under_any_schedule(driver, name):
    given, call = case(*CASES[name])
    results = []
    for seed in range(3):
        driver.seed = seed
        results.append(oracle.outputs_and_gradients(lambda *t: call(lk.attention, *t), given))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@on_sm_80
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_special_values(driver, value):
    given, call = case("small", F32, {"causal": True})
    given[0][0, 0, 3, 5] = value
    given[2][1, 1, 4, 2] = value
    oracle.check(
        *(lambda *t, f=f: call(f, *t) for f in (lk.attention, reference.attention)), given, gradients=False
    )


def test_the_limit_of_the_row(table):
    long = torch.empty(1, 1, 1, 1).expand(1, 1, 2**30, 1)
    with pytest.raises(
        NotImplementedError, match=r"attention: triton needs fewer than 2 \*\* 30 queries and keys, got 1073"
    ):
        lk.attention(long[:, :, :1], long, long, backend="triton")


@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("dim", [64, *(pytest.param(dim, marks=pytest.mark.long) for dim in (128, 256))])
@pytest.mark.parametrize("scored", [False, True], ids=["", "scored"])
def test_compiles_without_spills(table, sm, dtype, dim, scored, monkeypatch):
    monkeypatch.setitem(SHAPES, "compiled", (1, 2, 1, 144, 144, dim, dim))
    given, _ = case("compiled", dtype, {})
    options = {"window": (40, 20), "alibi_slopes": torch.ones(2), "sinks": torch.ones(2)}
    if scored:
        options |= {
            "bias": torch.randn(144, 144).to(dtype).requires_grad_(),
            "softcap": 2.0,
            "dropout_p": 0.1,
        }
        options["mask"] = torch.ones(144, 144, dtype=torch.bool)
    with triton_driver.activated(sm, execute=False) as driver:
        out, lse = lk.attention(*(t.requires_grad_() for t in given), **options, return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert {r.kernel for r in driver.resources} == {*FORWARD, *BACKWARD, *["_dbias_kernel"] * scored}
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
