"""The CUDA kernels of attention: packed sequences, pages, and keys divided among blocks."""

import pytest
import torch
from cuda_on_cpu.attention import FLAVOURS, Layout, loaded, on
from cuda_on_cpu.library import with_long
from ops.test_attention_cuda import BF16, F16, shown

import oracle
from lspm_kernels.reference import attention as reference


@pytest.fixture(params=with_long(FLAVOURS))
def library(request):
    yield from loaded(request.param)


def sequences(starts):
    return zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "seed": 5}], ids=["plain", "dropout"])
def test_packed_sequences(library, options):
    starts = [torch.tensor(s, dtype=torch.int32) for s in ((0, 70, 70, 75, 140), (0, 90, 93, 100, 231))]
    layout = Layout(70, 131, *starts)
    given = [torch.randn(1, H, n, 32).bfloat16() for H, n in ((4, 140), (2, 231), (2, 231))]

    def apart(q, k, v):
        found = []
        for b, ((i, j), (m, n)) in enumerate(zip(*map(sequences, starts), strict=True)):
            # As the last of b + 1 sequences, so that dropout draws what belongs to sequence b.
            pieces = (x.expand(b + 1, -1, -1, -1) for x in (q[:, :, i:j], k[:, :, m:n], v[:, :, m:n]))
            both = reference.attention(*pieces, causal=True, return_lse=True, **options)
            found.append([x[b:] for x in both])
        return shown(*(torch.cat(x, 2) for x in zip(*found, strict=True)))

    def packed(*t):
        return shown(*on(library)(*t, causal=True, layout=layout, return_lse=True, **options))

    oracle.check(packed, apart, given)


@pytest.mark.parametrize("splits", [0, 1, 2])
def test_pages(library, splits):
    counts, table = torch.tensor([37, 1, 64, 0]), torch.tensor([[3, 0], [5, -1], [1, 4], [-1, -1]])
    q, k, v = torch.randn(4, 4, 3, 32), torch.randn(6, 2, 32, 32), torch.randn(6, 2, 32, 32)

    def gathered(q, k, v):
        found = []
        for b, n in enumerate(counts.tolist()):
            pages = table[b, : (n + 31) // 32]
            keys, values = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, :n] for x in (k, v))
            found.append(reference.attention(q[b : b + 1], keys, values, causal=True, return_lse=True))
        return shown(*map(torch.cat, zip(*found, strict=True)))

    layout = Layout(3, 64, key_counts=counts.int(), pages=table.int())

    def paged(*t):
        return shown(*on(library, splits=splits)(*t, causal=True, layout=layout, return_lse=True))

    oracle.check(paged, gathered, [x.bfloat16() for x in (q, k, v)], gradients=False)


@pytest.mark.parametrize("splits", [0, 2])
def test_a_chosen_sequence_begins_behind_padding(library, splits):
    """A page is a whole sequence then; one is empty because all of its page is padding."""
    begins, counts, page = (torch.tensor(x) for x in ((5, 0, 70), (59, 70, 0), (2, 4, 0)))
    q, k, v = torch.randn(3, 4, 3, 32), torch.randn(5, 2, 70, 32), torch.randn(5, 2, 70, 32)

    def gathered(q, k, v):
        found = []
        for b, (begin, n, at) in enumerate(zip(begins, counts, page, strict=True)):
            keys, values = (x[at : at + 1, :, begin : begin + n] for x in (k, v))
            found.append(reference.attention(q[b : b + 1], keys, values, causal=True, return_lse=True))
        return shown(*map(torch.cat, zip(*found, strict=True)))

    starts, counts = begins.int(), counts.int()
    layout = Layout(3, 70, key_starts=starts, key_counts=counts, pages=page[:, None].int())

    def chosen(*t):
        return shown(*on(library, splits=splits)(*t, causal=True, layout=layout, return_lse=True))

    oracle.check(chosen, gathered, [x.bfloat16() for x in (q, k, v)], gradients=False)


# (B, H, H_kv, T_q, T_k, D, Dv), splits, dtype, options
DIVIDED = {
    "one query": ((2, 4, 1, 1, 300, 64, 64), 3, BF16, {}),
    "a group of heads in one part": ((2, 8, 2, 3, 200, 64, 64), 1, BF16, {"causal": True}),
    "a group of heads": ((2, 8, 2, 5, 400, 64, 40), 4, BF16, {"causal": True}),
    "window": ((1, 4, 2, 3, 230, 64, 64), 3, BF16, {"window": (60, 0), "sinks": True}),
    "more parts than tiles": ((1, 2, 1, 2, 70, 16, 16), 5, BF16, {"softcap": 2.0}),
    "more queries than keys": ((1, 2, 1, 6, 3, 64, 64), 2, BF16, {"causal": True, "sinks": True}),
    "odd dims": ((1, 2, 1, 2, 70, 7, 9), 2, BF16, {}),
    "no keys": ((1, 2, 1, 2, 0, 16, 16), 2, BF16, {}),
    "not divided: too many rows": ((1, 2, 1, 33, 140, 16, 16), 2, BF16, {}),
    "not divided: slopes": ((1, 2, 1, 3, 140, 16, 16), 2, BF16, {"slopes": True}),
    "128 dims in f16": ((1, 4, 4, 3, 200, 128, 128), 3, F16, {"causal": True}),
    "256 dims": ((1, 4, 2, 30, 150, 256, 200), 2, BF16, {"causal": True}),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_keys_divided_among_blocks(library, name):
    (B, H, H_kv, T_q, T_k, D, Dv), splits, dtype, options = DIVIDED[name]
    if library.flavour == "ptxcheck" and D > 64:
        pytest.skip("this PTX is not translated, to save time")
    options = dict(options)
    given = [torch.randn(s).to(dtype) for s in ((B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, Dv))]
    if options.pop("sinks", None):
        given.append(torch.randn(H))
    if options.pop("slopes", None):
        options["alibi_slopes"] = torch.rand(H)
    names = ("q", "k", "v", "sinks")[: len(given)]
    forms = (
        lambda *t, f=f: shown(*f(**dict(zip(names, t, strict=True)), **options, return_lse=True))
        for f in (on(library, splits=splits), reference.attention)
    )
    oracle.check(*forms, given, gradients=D <= 64)


def test_the_number_of_parts_hardly_changes_the_result(library):
    q, k, v = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64)
    given = [x.bfloat16() for x in (q, k, v)]
    whole, divided = (on(library, splits=n)(*given, return_lse=True) for n in (0, 4))
    torch.testing.assert_close(divided[1], whole[1], rtol=1e-6, atol=1e-6)
    again = on(library, splits=4)(*given, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(divided, again, strict=True))
