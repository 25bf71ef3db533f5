"""The Triton kernels of attention over sequences of unequal lengths: packed, padded, in pages of a cache."""

import functools
import itertools

import pytest
import torch
from ops.test_attention_triton import (  # noqa: F401
    BACKWARD,
    BF16,
    F32,
    FORWARD,
    REGISTERS,
    driver,
    on_sm_80,
    table,
)

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import attention as ops
from lspm_kernels.ops import attention_varlen as varlen
from lspm_kernels.ops import attention_with_kv_cache as kv_cache
from lspm_kernels.reference import attention as reference
from lspm_kernels.reference import attention_varlen as reference_varlen

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import uninitialised

from lspm_kernels.triton import attention

# Tiles have 32 queries and 16 keys: sequences that end within a tile and with one, that have fewer queries
# than keys and more, or have none.
QUERIES, KEYS = (37, 0, 5, 64, 1), (50, 20, 0, 33, 48)
H, H_KV, D, DV = 4, 2, 16, 24
EVERYTHING = {
    "slopes": 2, "softcap": 5.0, "dropout_p": 0.2, "seed": 3, "sinks": True, "window": (40, 9), "scale": 0.3,
    "return_lse": True,
}  # fmt: skip
CASES = {
    "causal": (F32, {"causal": True}),
    "16 bits": (BF16, {"window": (9, 4)}),
    "everything": (F32, EVERYTHING),
}


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def case(dtype, options, queries=QUERIES, keys=KEYS, dim=D, dim_v=DV):
    """The tensors of packed sequences that get a gradient, and a function of (attention_varlen, *tensors)."""
    options = dict(options)
    sizes = ((sum(queries), H, dim), (sum(keys), H_KV, dim), (sum(keys), H_KV, dim_v))
    given = [torch.randn(size).to(dtype) for size in sizes]
    sinks = [torch.randn(H)] if options.pop("sinks", None) else []
    if dims := options.pop("slopes", None):
        options["alibi_slopes"] = torch.rand((len(queries), H)[-dims:])

    def call(f, q, k, v, *sinks, **more):
        if sinks:
            more["sinks"] = sinks[0]
        found = f(q, k, v, starts(queries), starts(keys), **options, **more)
        if isinstance(found, tuple):  # where no key is seen, lse has no gradient
            return found[0], torch.where(found[1].isfinite(), found[1], 0.0)
        return found

    return given + sinks, call


@pytest.fixture(autouse=True)
def varlen_table(table, monkeypatch):  # noqa: F811
    monkeypatch.setattr(varlen, "BACKENDS", ops.BACKENDS)


@on_sm_80
@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", [pytest.param("causal", marks=pytest.mark.long), "16 bits", "everything"])
def test_packed_against_the_reference(name):
    given, call = case(*CASES[name])
    forms = (lk.attention_varlen, reference_varlen.attention_varlen)
    oracle.check(*(lambda *t, f=f: call(f, *t) for f in forms), given)


@on_sm_80
@pytest.mark.usefixtures("driver")
def test_a_packed_sequence_has_the_bits_of_its_own_call():
    """Whatever the sequences beside it hold, and however long the longest might have been."""
    given, call = case(F32, {"causal": True})
    q, k, v = (t.requires_grad_() for t in given)
    out = call(lk.attention_varlen, q, k, v, max_seqlen_q=150, max_seqlen_k=90)
    rows, key_rows = slice(42, 106), slice(70, 103)
    dout = torch.zeros_like(out)
    dout[rows] = torch.randn(64, H, DV)
    found = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        for x, own in ((q, rows), (k, key_rows), (v, key_rows)):
            x[: own.start] = float("nan")
            x[own.stop :] = float("nan")
    poisoned = call(lk.attention_varlen, q, k, v)
    assert torch.equal(poisoned[rows], out[rows])
    alone = [x[own].transpose(0, 1)[None] for x, own in ((q, rows), (k, key_rows), (v, key_rows))]
    expected = lk.attention(*alone, causal=True)
    assert torch.equal(out[rows].transpose(0, 1)[None], expected)
    expected = torch.autograd.grad(expected, (q, k, v), dout[rows].transpose(0, 1)[None])
    for x, y, own in zip(found, expected, (rows, key_rows, key_rows), strict=True):
        assert torch.equal(x[own], y[own])
        assert not x[: own.start].any() and not x[own.stop :].any()


COUNTS = (50, 0, 7, 33)
# How a cache holds the keys: rows of a page or None, the rows before each sequence's first, and how many
# queries each sequence has, or one number of all.
CACHES = {
    "counts": (None, None, 5),
    "padded to the left": (None, (3, 9, 0, 20), 37),
    "indexed and padded": (90, (3, 9, 0, 20), 1),
    "pages of tiles": (32, None, 37),
    "pages of a row": (1, None, 1),
    "pages across tiles": (5, None, (40, 1, 0, 3)),
    "pages padded to the left": (16, (3, 9, 0, 20), 5),
}


def cache(parts, page_rows, before):
    """Sequences (heads, rows, dim) as a cache has them, NaN where they are not, and their pages."""
    heads, _, dim = parts[0].shape
    ends = [part.shape[1] + first for part, first in zip(parts, before, strict=True)]
    columns = 1 if page_rows is None else -(-max(ends) // page_rows)
    pages = torch.arange(len(parts) * columns, dtype=torch.int32)
    if page_rows is not None:
        pages = pages.flip(0)
    pages = pages.view(len(parts), columns)
    page_rows = page_rows or max(ends)
    whole = torch.full((pages.numel(), heads, page_rows, dim), float("nan"))
    for own, first, end, part in zip(pages, before, ends, parts, strict=True):
        for row in range(first, end):
            whole[own[row // page_rows], :, row % page_rows] = part[:, row - first]
        own[-(-end // page_rows) :] = 2**30  # of no page: to read it is to read out of bounds
    return whole, pages


@on_sm_80
@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", CACHES)
def test_cached_keys_against_the_reference(name):
    page_rows, before, lengths = CACHES[name]
    packed = isinstance(lengths, tuple)
    lengths = lengths if packed else [lengths] * len(COUNTS)
    q = [torch.randn(H, n, D) for n in lengths]
    k, v = ([torch.randn(H_KV, n, dim) for n in COUNTS] for dim in (D, DV))
    (k_cache, pages), (v_cache, _) = (cache(x, page_rows, before or [0] * len(COUNTS)) for x in (k, v))
    given = torch.cat(q, 1)[None] if packed else torch.stack(q)
    out, lse = (uninitialised(torch.empty(*given.shape[:3], *dim)) for dim in ((DV,), ()))
    sequences = (
        starts(lengths) if packed else None,
        None if before is None else torch.tensor(before, dtype=torch.int32),
        torch.tensor(COUNTS, dtype=torch.int32),
        None if page_rows is None else pages,
        max(lengths),
        max(COUNTS),
    )
    attention.forward(
        given, k_cache, v_cache, None, None, None, None, out, lse, torch.empty(2, *lse.shape), sequences,
        (20, 2, 12345, 0), (0.3, 0.0, 0.0),
    )  # fmt: skip

    def expected(dtype):
        options = {"window": (20, 2), "scale": 0.3, "return_lse": True}
        given = ((x[None].to(dtype) for x in qkv) for qkv in zip(q, k, v, strict=True))
        each = [reference.attention(*qkv, **options) for qkv in given]
        return [torch.cat(parts, 2 if packed else 0) for parts in zip(*each, strict=True)]

    for output, *three in zip(
        ("out", "lse"), (out, lse), expected(torch.float64), expected(F32), strict=True
    ):
        oracle.compare(output, *three)


@on_sm_80
@pytest.mark.usefixtures("driver")
def test_a_cache_that_grows(monkeypatch):
    monkeypatch.setattr(kv_cache, "BACKENDS", ops.BACKENDS)
    k_cache, v_cache = (torch.randn(3, H_KV, 60, dim) for dim in (D, DV))
    q, k, v = torch.randn(2, H, 5, D), torch.randn(2, H_KV, 5, D), torch.randn(2, H_KV, 5, DV)
    options = {
        "cache_seqlens": torch.tensor([20, 31]), "cache_batch_idx": torch.tensor([2, 0]), "causal": True,
        "cache_leftpad": torch.tensor([4, 0]), "window": (18, None), "return_lse": True,
    }  # fmt: skip

    def form(f, *tensors):
        q, k_cache, v_cache, k, v = (x.clone() for x in tensors)
        with torch.no_grad():
            return f(q, k_cache, v_cache, k, v, **options), k_cache, v_cache

    given = q, k_cache, v_cache, k, v
    (found, *caches), (plain, *plain_caches) = (
        form(functools.partial(lk.attention_with_kv_cache, backend=name), *given)
        for name in (None, "reference")
    )
    truth, *_ = form(
        functools.partial(lk.attention_with_kv_cache, backend="reference"), *(x.double() for x in given)
    )
    for x, y in zip(caches, plain_caches, strict=True):
        assert torch.equal(x, y)
    for name, *three in zip(("out", "lse"), found, truth, plain, strict=True):
        oracle.compare(name, *three)


ALL = itertools.product((80, 90, 100), (64, 128, 256), (BF16, F32))


@pytest.mark.parametrize(
    "sm, dim, dtype", [(90, 64, BF16), *(pytest.param(*at, marks=pytest.mark.long) for at in ALL)]
)
@pytest.mark.parametrize("scored", [False, True], ids=["", "scored"])
def test_compiles_without_spills(sm, dim, dtype, scored):
    options = {"window": (40, 20), "slopes": 1, "sinks": True, "return_lse": True}
    if scored:
        options |= {"softcap": 2.0, "dropout_p": 0.1, "seed": 1}
    given, call = case(dtype, options, (144,), (144,), dim, dim)
    q, k, v = (t.transpose(0, 1)[None] for t in given[:3])
    with triton_driver.activated(sm, execute=False) as gpu:
        out, lse = call(lk.attention_varlen, *(t.requires_grad_() for t in given))
        (out.sum() + lse.sum()).backward()
        for page_rows in (16, 64):
            pages = (x[:, :, :page_rows].expand(2, -1, -1, -1) for x in (k, v))
            counts, pages_of = torch.full((1,), 144, dtype=torch.int32), torch.ones(1, 9, dtype=torch.int32)
            attention.forward(
                q, *pages, None, None, torch.ones(1, H, 1, 1), given[3], out, lse, torch.empty(2, H, 144),
                (None, None, counts, pages_of, 144, 144), (40, 20, 0, 1),
                (1.0, 2.0, 0.1) if scored else (1.0, 0.0, 0.0),
            )  # fmt: skip
    assert sorted(r.kernel for r in gpu.resources) == sorted(FORWARD * 3 + BACKWARD)
    assert not [r for r in gpu.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
