"""attention_varlen: packed sequences, each of which is as the reference has it alone."""

import subprocess
import sys

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import attention as alone
from lspm_kernels.reference import attention_varlen as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Lengths of queries and of keys. The CPU kernels' tiles have 256 keys and 32, 64 or 256 queries.
LENGTHS = {
    "unequal": ((5, 0, 290, 33), (7, 4, 310, 33)),
    "more queries than keys": ((70, 12, 300), (20, 12, 0)),
    "shifts far apart": ((40, 300), (600, 300)),
    "few queries": ((1, 2, 3), (300, 20, 513)),
    "one sequence": ((600,), (700,)),
    "many": (tuple(range(1, 14)),) * 2,
    "no sequences": ((), ()),
    "only empty ones": ((0, 0), (0, 0)),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 3)},
    "slopes": {"slopes": 1, "causal": True},
    "slopes of a sequence": {"slopes": 2},
    "softcap and scale": {"softcap": 2.0, "scale": 0.3},
    "dropout": {"dropout_p": 0.3, "seed": 2**62 + 5},
    "sinks": {"sinks": True, "window": (20, 0)},
    "everything": {
        "slopes": 2, "softcap": 4.0, "dropout_p": 0.2, "seed": 3, "sinks": True, "window": (60, 9),
        "scale": 0.2,
    },
}  # fmt: skip


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0], dtype=dtype)


def case(lengths, options, dtype=F32, H=4, H_kv=2, D=16, Dv=24):
    """The tensors that get a gradient, and a function of (attention, *tensors)."""
    options = dict(options)
    rows, key_rows = map(sum, lengths)
    sizes = (rows, H, D), (key_rows, H_kv, D), (key_rows, H_kv, Dv)
    given, names = [torch.randn(size).to(dtype) for size in sizes], ["q", "k", "v"]
    if options.pop("sinks", None):
        given.append(torch.randn(H))
        names.append("sinks")
    if dims := options.pop("slopes", None):
        options["alibi_slopes"] = torch.rand((len(lengths[0]), H)[-dims:])
    ends = [starts(n) for n in lengths]

    def call(f, *t, **more):
        named = dict(zip(names, t, strict=True))
        q, k, v = (named.pop(name) for name in "qkv")
        out, lse = f(q, k, v, *ends, **named, **options, **more, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    return given, call


def check(lengths, options, dtype=F32, **sizes):
    given, call = case(lengths, options, dtype, **sizes)
    forms = (lambda *t, f=f: call(f, *t) for f in (lk.attention_varlen, reference.attention_varlen))
    oracle.check(*forms, given)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", ["unequal", "more queries than keys", "shifts far apart"])
def test_against_the_reference(lengths, name, dtype):
    check(LENGTHS[lengths], OPTIONS[name], dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths):
    check(LENGTHS[lengths], {"causal": True}, F16)
    check(LENGTHS[lengths], {}, BF16, H=3, H_kv=3, D=64, Dv=64)


def test_under_every_instruction_set(isa):
    for dtype in (F32, BF16):
        check(LENGTHS["unequal"], OPTIONS["everything"], dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_few_queries_without_a_gradient(name):
    given, call = case(LENGTHS["few queries"], OPTIONS[name], BF16)
    forms = (lambda *t, f=f: call(f, *t) for f in (lk.attention_varlen, reference.attention_varlen))
    oracle.check(*forms, given, gradients=False)


@pytest.mark.every_backend
def test_a_sequence_is_attention_of_it_alone():
    lengths = LENGTHS["unequal"]
    (q, k, v), call = case(lengths, {"causal": True})
    out, _ = call(lk.attention_varlen, q, k, v)
    ends = [starts(n).tolist() for n in lengths]
    for b in range(4):
        (first, last), (begin, end) = (n[b : b + 2] for n in ends)
        parts = (x.transpose(0, 1)[None] for x in (q[first:last], k[begin:end], v[begin:end]))
        assert torch.equal(out[first:last], lk.attention(*parts, causal=True)[0].transpose(0, 1))


@pytest.mark.every_backend
def test_views_are_read_where_they_lie():
    qkv = torch.randn(40, 3, 4, 16)
    ends = starts((30, 10))
    with torch.profiler.profile() as profile:
        out = lk.attention_varlen(*qkv.unbind(1), ends, ends, 30, 30)
    assert out.is_contiguous() and "aten::copy_" not in {event.key for event in profile.events()}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_for_any_number_of_threads(dtype):
    given, call = case(LENGTHS["many"], OPTIONS["everything"], dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(oracle.outputs_and_gradients(lambda *t: call(lk.attention_varlen, *t), given))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_pages(name):
    """Packed queries against keys in pages."""
    lengths, S = LENGTHS["unequal"], 16
    (q, _, _, *sinks), call = case(lengths, OPTIONS[name])
    table = torch.randperm(4 * 20).view(4, 20)
    pages = torch.randn(80, S, 2, 16), torch.randn(80, S, 2, 24)
    with torch.no_grad():
        results = [
            call(f, q, *pages, *sinks, block_table=table)
            for f in (lk.attention_varlen, reference.attention_varlen)
        ]
        truth = call(
            reference.attention_varlen, q.double(), *(x.double() for x in pages), *sinks, block_table=table
        )
    for i, what in enumerate(("out", "lse")):
        oracle.compare(what, results[0][i], truth[i], results[1][i])


MEMORY = """
import resource, torch, lspm_kernels as lk
def run(T):
    q, k, v = (torch.zeros(2 * T, 2, 8, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, T // 2, 2 * T])
    lk.attention_varlen(q, k, v, ends, ends, causal=True).sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(64)
before = peak()
run(6000)
print(peak() - before)
"""


@pytest.mark.every_backend
def test_a_table_without_pages():
    """No sequence has a key then: each query gives 0."""
    q, pages, none = torch.randn(5, 4, 16), torch.randn(6, 8, 2, 16), torch.zeros(2, 0, dtype=torch.int32)
    starts, empty = torch.tensor([0, 2, 5]), torch.zeros(3, dtype=torch.int32)
    out, lse = lk.attention_varlen(q, pages, pages, starts, empty, block_table=none, return_lse=True)
    assert torch.equal(out, torch.zeros(5, 4, 16)) and (lse == -torch.inf).all()


@pytest.mark.parametrize("unused", [-9, 99])
def test_a_table_names_pages_where_keys_are(unused):
    q, pages = torch.randn(5, 4, 16), torch.randn(6, 8, 2, 16)
    starts, table = (torch.tensor([0, 2, 5]), torch.tensor([0, 8, 17])), torch.tensor([[4, unused], [5, 0]])
    ours, theirs = (
        lk.attention_varlen(q, pages, pages, *starts, block_table=table, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(ours, theirs)


def test_memory_is_linear_in_the_length():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB; one head's scores of the longer sequence alone would be 309


@pytest.mark.every_backend
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(mode):
    torch._dynamo.reset()
    lengths = LENGTHS["unequal"]
    given, call = case(lengths, OPTIONS["everything"])
    longest = {"max_seqlen_q": max(lengths[0]), "max_seqlen_k": max(lengths[1])}
    ours = torch.compile(lambda *t: call(lk.attention_varlen, *t, **longest), fullgraph=True, backend=mode)
    oracle.check(ours, lambda *t: call(reference.attention_varlen, *t), given)


def test_opcheck():
    q, k, v = (torch.randn(1, h, n, 16).requires_grad_() for h, n in ((4, 30), (2, 40), (2, 40)))
    ends = starts((20, 10)), starts((15, 25))
    sinks = torch.randn(4, requires_grad=True)
    options = (torch.tensor(5), None, None, 20, 25, 7, 0, False, 0.25, 2.0, 0.1, "cpu")
    given = (q, k, v, None, None, torch.rand(2, 4, 1, 1), sinks, *ends, *options)
    torch.library.opcheck(torch.ops.lspm.attention.default, given)


def test_autocast_computes_in_its_dtype():
    (q, k, v), call = case(LENGTHS["unequal"], {})
    with torch.autocast("cpu", BF16):
        assert call(lk.attention_varlen, q, k.to(BF16), v)[0].dtype == BF16


def test_plain_pytorch_runs_what_no_kernel_takes():
    given, call = case(LENGTHS["unequal"], OPTIONS["everything"], torch.float64)
    with pytest.warns(
        lk.FallbackWarning, match="attention_varlen: cpu needs dtype float32, bfloat16, float16"
    ):
        out, _ = call(lk.attention_varlen, *given)
    assert torch.equal(out, call(reference.attention_varlen, *given)[0])


@pytest.mark.every_backend
def test_dropout_counts_sequences():
    """What is dropped of sequence b is what attention drops of batch b."""
    q = torch.randn(2, 20, 1, 8)
    ends = starts((20, 20))
    packed = lk.attention_varlen(*[q.flatten(0, 1)] * 3, ends, ends, dropout_p=0.5, seed=9).view(2, 20, 1, 8)
    dense = alone.attention(*[q.transpose(1, 2)] * 3, dropout_p=0.5, seed=9).transpose(1, 2)
    torch.testing.assert_close(packed, dense)
