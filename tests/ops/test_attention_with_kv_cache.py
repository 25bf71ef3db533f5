"""attention_with_kv_cache: what it appends, where, and the attention to it."""

import functools
import itertools

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import attention_with_kv_cache as table_of_op
from lspm_kernels.reference import attention as dense
from lspm_kernels.reference import attention_with_kv_cache as reference
from lspm_kernels.reference import rotary

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
B, H, H_KV, S, D, DV = 3, 4, 2, 600, 32, 16
LENGTHS = (0, 300, 555)
KINDS = ["dense", "pages of 16", "pages of 256", "chosen", "padded", "chosen and padded"]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "everything": {"window": (90, 3), "alibi_slopes": (B, H), "softcap": 3.0, "scale": 0.3, "sinks": (H,)},
}


def options_of(name):
    """Slopes and sinks, of which the table gives the shape, at random."""
    tensors = ("alibi_slopes", "sinks")
    return {key: torch.rand(x) if key in tensors else x for key, x in OPTIONS[name].items()}


def cache(kind, dtype):
    """k_cache, v_cache, the options that say how they lie, and the same for the reference: begins, table."""
    if kind.startswith("pages"):
        rows = int(kind.split()[-1])
        P = -(-S // rows)
        table = torch.randperm(B * P + 2)[: B * P].view(B, P)
        sizes, options, begins = (B * P + 2, H_KV, rows), {"block_table": table}, [0] * B
    else:
        begins = [0, 7, 200] if "padded" in kind else [0] * B
        sizes, table = (B, H_KV, S), None
        options = {"cache_leftpad": torch.tensor(begins)} if "padded" in kind else {}
    if "chosen" in kind:
        table = torch.tensor([4, 0, 2])
        sizes, options["cache_batch_idx"] = (5, H_KV, S), table
        table = table[:, None]
    k, v = (torch.randn(*sizes, dim).to(dtype) for dim in (D, DV))
    return k, v, options, begins, table


def appended(x, new, table, lengths):
    """A copy of the cache x, with new (B, H_kv, T, dim) behind `lengths`, one element after the other."""
    x = x.clone()
    for b, length in enumerate(lengths):
        for t in range(new.shape[2]):
            page, row = (
                (b, length + t)
                if table is None
                else (table[b, (length + t) // x.shape[2]], (length + t) % x.shape[2])
            )
            x[page, :, row] = new[b, :, t]
    return x


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("new", [0, 1, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(name, kind, new, dtype):
    k_cache, v_cache, options, begins, table = cache(kind, dtype)
    lengths = [max(length, begin) for length, begin in zip(LENGTHS, begins, strict=True)]
    q = torch.randn(B, H, new or 2, D).to(dtype)
    k, v = (torch.randn(B, H_KV, new, dim).to(dtype) for dim in (D, DV))
    expected = [appended(x, y, table, lengths) for x, y in ((k_cache, k), (v_cache, v))]
    counts = [length + new - begin for length, begin in zip(lengths, begins, strict=True)]
    more = options_of(name)

    def call(q, k, v):
        return reference.attention_with_kv_cache(q, k, v, begins, counts, table, **more, return_lse=True)

    out, lse = lk.attention_with_kv_cache(
        q, k_cache, v_cache, *((k, v) if new else ()), cache_seqlens=torch.tensor(lengths), **options,
        **more, return_lse=True,
    )  # fmt: skip
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
    truth, plain = call(q.double(), *(x.double() for x in expected)), call(q, *expected)
    oracle.compare("out", out, truth[0], plain[0])
    seen = plain[1].isfinite()
    assert torch.equal(lse.isfinite(), seen)
    oracle.compare("lse", lse[seen], truth[1][seen], plain[1][seen])


def test_under_every_instruction_set(isa):
    for new in (1, 40):
        test_against_the_reference("everything", "pages of 16", new, F16)
    for dtype in (F32, BF16, F16):
        test_one_kernel_appends_as_torch_does("pages of 16", dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary_on_the_way(causal, interleaved):
    """Query and key i stand at cache_seqlens + i; without a window all queries at cache_seqlens."""
    k_cache, v_cache, *_ = cache("dense", F32)
    cos, sin = (f(torch.rand(S, 8) * 6) for f in (torch.cos, torch.sin))
    q, k, v = torch.randn(B, H, 5, D), torch.randn(B, H_KV, 5, D), torch.randn(B, H_KV, 5, DV)
    at = torch.tensor(LENGTHS)

    def turned(x, steps):
        rows = [
            rotary.rotary(x[:, :, t : t + 1], cos, sin, interleaved=interleaved, offsets=at + t * steps)
            for t in range(5)
        ]
        return torch.cat(rows, 2)

    expected = appended(k_cache, turned(k, 1), None, LENGTHS)
    out = lk.attention_with_kv_cache(
        q, k_cache, v_cache, k, v, cache_seqlens=at, cos=cos, sin=sin, interleaved=interleaved, causal=causal
    )
    torch.testing.assert_close(k_cache, expected, rtol=1e-6, atol=1e-6)
    counts = [length + 5 for length in LENGTHS]
    meant = reference.attention_with_kv_cache(
        turned(q, int(causal)), expected, v_cache, [0] * B, counts, causal=causal
    )
    torch.testing.assert_close(out, meant, rtol=1e-5, atol=1e-5)


def in_torch(q, *given, at):
    """What the kernel that appends replaces, which the GPUs and traces have."""
    return table_of_op._append(q, *given, at, None)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_appends_as_torch_does(kind, dtype):
    """Bit by bit: pairs of any number, of either style, at any place, beside as many queries as there are."""
    k_cache, v_cache, options, *_ = cache(kind, dtype)
    for half, table_dtype, interleaved, steps, queries, new in itertools.product(
        (0, 5, D // 2), (F32, dtype), (False, True), (False, True), (1, 6), (1, 3)
    ):
        at = 300 if "padded" not in kind and half == 5 else torch.tensor(LENGTHS)
        angles = [f(torch.rand(S, half) * 6).to(table_dtype) for f in (torch.cos, torch.sin)] if half else []
        turned = dict(zip(("cos", "sin"), angles, strict=False), interleaved=interleaved, causal=steps)
        qkv = torch.randn(B, max(queries, new), H + 2 * H_KV, D).to(dtype).transpose(1, 2)
        q, k, v = qkv.split((H, H_KV, H_KV), 1)
        given = q[:, :, :queries], k[:, :, :new], v[:, :, :new, :DV]
        results = []
        for at_once in (True, False):
            caches = k_cache.clone(), v_cache.transpose(1, 2).contiguous().transpose(1, 2)
            with pytest.MonkeyPatch.context() as patch:
                if not at_once:
                    patch.setattr(table_of_op, "_append_at_once", functools.partial(in_torch, at=at))
                call = lk.attention_with_kv_cache(
                    given[0], *caches, *given[1:], cache_seqlens=at, return_lse=True, **options, **turned
                )
            results.append((*caches, *call))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)), (half, table_dtype, turned)


def test_many_keys_are_appended_by_any_number_of_threads():
    cos, sin, caches = torch.rand(S, 32), torch.rand(S, 32), []
    q, k, v = (torch.randn(B, 8, 200, 64) for _ in range(3))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        caches.append(torch.zeros(2, B, 8, S, 64))
        lk.attention_with_kv_cache(
            q, *caches[-1], k, v, cache_seqlens=torch.tensor((0, 7, 400)), cos=cos, sin=sin, causal=True
        )
    assert all(torch.equal(caches[0], other) for other in caches[1:])
    assert torch.equal(caches[0][1, 1, :, 7:207], v[1]) and caches[0][:, 1, :, 207:].count_nonzero() == 0


@pytest.mark.every_backend
def test_step_by_step_is_the_whole():
    """A text generated token by token, in one cache, has the attention of the whole text at once."""
    q, k, v = torch.randn(2, H, 70, D), torch.randn(2, H_KV, 70, D), torch.randn(2, H_KV, 70, DV)
    k_cache, v_cache = torch.zeros(2, H_KV, 70, D), torch.zeros(2, H_KV, 70, DV)
    outs, at = [], 0
    for step in (60, 1, 1, 3, 5):
        now = slice(at, at + step)
        outs.append(
            lk.attention_with_kv_cache(
                q[:, :, now], k_cache, v_cache, k[:, :, now], v[:, :, now], cache_seqlens=at, causal=True
            )
        )
        at += step
    torch.testing.assert_close(
        torch.cat(outs, 2), dense.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-5
    )


@pytest.mark.every_backend
def test_a_cache_lies_as_it_likes():
    """(B, S, H_kv, D) by its transpose: written in place, read where it lies, whole without cache_seqlens."""
    k_cache, v_cache = torch.randn(2, 50, H_KV, D), torch.randn(2, 50, H_KV, DV)
    q = torch.randn(2, H, 1, D)
    views = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    out = lk.attention_with_kv_cache(q, *views)
    torch.testing.assert_close(out, dense.attention(q, *views))
    assert out.transpose(1, 2).is_contiguous()
    version = k_cache._version
    new = torch.ones(2, H_KV, 1, D), torch.ones(2, H_KV, 1, DV)
    lk.attention_with_kv_cache(q, *views, *new, cache_seqlens=9)
    assert (k_cache[:, 9] == 1).all() and (v_cache[:, 9] == 1).all() and k_cache._version > version
    with torch.inference_mode():  # there tensors have no version
        inside = k_cache.clone().transpose(1, 2), v_cache.clone().transpose(1, 2)
        lk.attention_with_kv_cache(q, *inside, *new, cache_seqlens=10)
    assert (inside[0][:, :, 10] == 1).all() and (inside[1][:, :, 10] == 1).all()


@pytest.mark.parametrize("queries", [1, 40])
def test_same_bits_for_any_number_of_threads(queries):
    k_cache, v_cache, options, *_ = cache("pages of 16", BF16)
    q, outs = torch.randn(B, H, queries, D).to(BF16), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        at = torch.tensor(LENGTHS) + 40
        outs.append(lk.attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens=at, causal=True, **options))
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_wherever_rows_lie(dtype):
    """A thread reads the heads of a cache one by one, or several side by side, as they lie."""
    heads, outs = 5, []
    k, v = (torch.randn(2, heads, S, dim).to(dtype) for dim in (D, DV))
    q, order = torch.randn(2, 3 * heads, 1, D).to(dtype), torch.randperm(2 * S // 20)
    pages = [
        x.transpose(1, 2).reshape(-1, 20, heads, x.shape[-1]).transpose(1, 2)[order.argsort()] for x in (k, v)
    ]
    caches = {
        "heads apart": (k, v, {}),
        "heads side by side": (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)), {}),
        "pages": (*pages, {"block_table": order.view(2, -1)}),
    }
    for threads in (1, 2, 3):  # five heads at once, two and the fifth, one
        torch.set_num_threads(threads)
        outs += [lk.attention_with_kv_cache(q, k, v, **options) for k, v, options in caches.values()]
    oracle.compare(
        "out", outs[0], dense.attention(*(x.double() for x in (q, k, v))), dense.attention(q, k, v)
    )
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("unused", [-9, 99])
def test_a_table_names_pages_where_keys_are(unused):
    pages, q, table = torch.randn(2, 3, H_KV, 8, D), torch.randn(2, H, 1, D), [[2, unused], [0, 1]]
    options = {"cache_seqlens": torch.tensor([8, 9]), "block_table": torch.tensor(table)}
    ours, theirs = (lk.attention_with_kv_cache(q, *pages, **options, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_sequences_and_no_pages(backend):
    cache, q, options = torch.randn(2, 3, H_KV, 8, D), torch.randn(2, H, 1, D), {"backend": backend}
    out, lse = lk.attention_with_kv_cache(q[:0], *cache[:, :0], return_lse=True, **options)
    assert out.shape == (0, H, 1, D) and lse.shape == (0, H, 1) and lse.dtype == F32
    none = {"cache_seqlens": torch.zeros(2, dtype=torch.int32), "block_table": torch.zeros(2, 0).int()}
    assert torch.equal(lk.attention_with_kv_cache(q, *cache, **none, **options), torch.zeros_like(q))


@pytest.mark.every_backend
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["dense", "pages of 16"])
def test_compile(kind, mode):
    torch._dynamo.reset()
    k_cache, v_cache, options, *_ = cache(kind, F32)
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, H_KV, 1, D), torch.randn(B, H_KV, 1, DV)
    cos, sin = torch.rand(S, 8), torch.rand(S, 8)

    def step(q, k_cache, v_cache, k, v, at):
        return lk.attention_with_kv_cache(
            q, k_cache, v_cache, k, v, cache_seqlens=at, cos=cos, sin=sin, causal=True, **options
        )

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend=mode)):
        caches = k_cache.clone(), v_cache.clone()
        results.append((f(q, *caches, k, v, torch.tensor(LENGTHS)), *caches))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_plain_pytorch_runs_what_no_kernel_takes():
    k_cache, v_cache, options, begins, table = cache("pages of 16", torch.float64)
    q = torch.randn(B, H, 2, D).double()
    with pytest.warns(lk.FallbackWarning, match="attention_with_kv_cache: cpu needs dtype float32"):
        out = lk.attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens=torch.tensor(LENGTHS), **options)
    assert torch.equal(out, reference.attention_with_kv_cache(q, k_cache, v_cache, begins, LENGTHS, table))
