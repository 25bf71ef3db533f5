"""attention: windows, biases, masks, slopes, caps, dropout, sinks and the gradient of lse."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import attention as reference
from lspm_kernels.reference import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, H_kv, T_q, T_k, D, Dv. The CPU kernels' tiles have 256 keys and 32 or 64 queries, in blocks of 256.
SHAPES = {
    "small": (2, 4, 2, 40, 50, 16, 24),
    "several tiles": (1, 2, 1, 330, 600, 16, 16),
    "more queries than keys": (2, 2, 2, 150, 70, 32, 32),
    "few queries": (2, 4, 2, 3, 530, 64, 80),
}
# What a case adds to q, k and v, as tensors that get a gradient or not, and as options.
OPTIONS = {
    "window": {"window": (20, 7)},
    "window to the left": {"window": (70, None)},
    "window to the right": {"window": (None, 3)},
    "causal window": {"window": (64, 9), "causal": True},
    "window of one": {"window": (0, 0)},
    "top-left causal": {"causal": True, "top_left": True},
    "top-left window": {"window": (30, 5), "top_left": True},
    "bias": {"bias": (2, 2, 1, 1)},
    "bias of a head": {"bias": (0, 2, 1, 1), "causal": True},
    "bias of a row": {"bias": (0, 0, 1, 0), "window": (33, 40)},
    "bias of a key": {"bias": (2, 0, 0, 1)},
    "bias of all": {"bias": (0, 0, 0, 0)},
    "mask": {"mask": (2, 0, 1, 1)},
    "padding mask": {"mask": (2, 0, 0, 1), "causal": True},
    "added mask": {"added": (0, 2, 1, 1)},
    "bias and mask": {"bias": (0, 2, 1, 1), "mask": (2, 0, 0, 1)},
    "slopes": {"slopes": 1, "causal": True},
    "slopes of a batch": {"slopes": 2},
    "softcap": {"softcap": 3.0},
    "softcap, bias and slopes": {"softcap": 2.0, "bias": (2, 0, 1, 1), "slopes": 1, "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 7},
    "causal dropout": {"dropout_p": 0.1, "seed": 2**62 + 12345, "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "sinks and a window": {"sinks": True, "window": (12, 0)},
    "everything": {
        "bias": (2, 2, 1, 1), "mask": (2, 0, 0, 1), "slopes": 1, "softcap": 5.0, "dropout_p": 0.2, "seed": 3,
        "sinks": True, "window": (120, 60), "scale": 0.3,
    },
}  # fmt: skip


def broadcast(kinds, sizes):
    """Sizes of what is one for all where kinds is 0."""
    return [size if kind else 1 for kind, size in zip(kinds, sizes, strict=True)]


def case(options, shape, dtype):
    """The tensors of a shape that get a gradient, and a function of (attention, *tensors)."""
    B, H, H_kv, T_q, T_k, D, Dv = shape
    options = dict(options)
    given = [torch.randn(s).to(dtype) for s in ((B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, Dv))]
    names, sizes = ["q", "k", "v"], (B, H, T_q, T_k)
    if kinds := options.pop("bias", None):
        given.append(torch.randn(broadcast(kinds, sizes)).to(dtype))
        names.append("bias")
    if options.pop("sinks", None):
        given.append(torch.randn(H))
        names.append("sinks")
    if kinds := options.pop("mask", None):
        options["mask"] = torch.rand(broadcast(kinds, sizes)) < 0.7
    if kinds := options.pop("added", None):
        added = torch.randn(broadcast(kinds, sizes))
        options["mask"] = added.masked_fill(added > 1, -torch.inf).to(dtype)
    if dims := options.pop("slopes", None):
        options["alibi_slopes"] = torch.rand((B, H)[-dims:])
    return given, lambda f, *t, **more: f(**dict(zip(names, t, strict=True)), **options, **more)


def check(options, shape, dtype, **more):
    given, call = case(options, SHAPES[shape], dtype)
    oracle.check(*(lambda *t, f=f: call(f, *t, **more) for f in (lk.attention, reference.attention)), given)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(name, shape, dtype):
    check(OPTIONS[name], shape, dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_few_queries_without_a_gradient(name, dtype):
    given, call = case(OPTIONS[name], SHAPES["few queries"], dtype)
    forms = (lambda *t, f=f: call(f, *t, return_lse=True) for f in (lk.attention, reference.attention))
    oracle.check(*forms, given, gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["window", "mask", "sinks", "bias", "dropout", "everything"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_lse(name, shape):
    given, call = case(OPTIONS[name], SHAPES[shape], torch.float32)

    def form(f):
        def run(*t):
            out, lse = call(f, *t, return_lse=True)
            return out, torch.where(lse.isfinite(), lse, 0)

        return run

    oracle.check(form(lk.attention), form(reference.attention), given)


@pytest.mark.every_backend
def test_lse_alone_has_a_gradient():
    given, call = case({}, SHAPES["small"], torch.float32)
    forms = (lambda *t, f=f: call(f, *t, return_lse=True)[1] for f in (lk.attention, reference.attention))
    oracle.check(*forms, given)


@pytest.mark.every_backend
def test_scores_at_their_cap_have_no_gradient():
    q, k, v = (torch.randn(1, 2, 40, 16).sign().requires_grad_() for _ in range(3))
    out, lse = lk.attention(q * 8, k * 8, v, softcap=0.5, scale=1.0, return_lse=True, mask=(q @ k.mT) != 0)
    dq, dk, dv = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    assert not dq.any() and not dk.any() and dv.any()


@pytest.mark.parametrize("name", ["causal window", "bias of a head", "softcap", "dropout", "everything"])
def test_every_instruction_set(isa, name):
    for dtype in DTYPES:
        check(OPTIONS[name], "several tiles", dtype)


@pytest.mark.parametrize("name", ["window", "bias", "bias of all", "dropout", "everything"])
def test_same_bits_for_any_number_of_threads(name):
    given, call = case(OPTIONS[name], SHAPES["several tiles"], torch.float32)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(oracle.outputs_and_gradients(lambda *t: call(lk.attention, *t), given))
    for key, first in results[0].items():
        assert all(torch.equal(first, other[key]) for other in results[1:]), key


def test_philox_is_the_published_one():
    """Counter and key of zeros, and of ones, in the test vectors of Salmon et al.'s Random123."""
    words = {0: 0x6627E8D5, 1: 0xE169C58D, 2: 0xBC57AC4C, 3: 0x9B00DBD8}
    for word, value in words.items():
        j = word * 16  # counter (0, 0, 0, 0), seed 0
        assert philox.kept(0, value / 2**32, range(1), 1, 1, 64, torch.device("cpu"))[0, 0, 0, j]
        assert not philox.kept(0, (value + 1) / 2**32, range(1), 1, 1, 64, torch.device("cpu"))[0, 0, 0, j]


def test_the_share_of_dropout_is_not_rounded():
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    v[:, :, 0] = 1.0
    word = 0x6627E8D5  # of key 0 under seed 0; float32 has no number between this share and the next
    for threshold in (word, word + 1):
        out = lk.attention(q, k, v, dropout_p=threshold / 2**32, seed=0)
        assert (out != 0).all() if word >= threshold else (out == 0).all()


@pytest.mark.every_backend
def test_dropout_drops_its_share():
    q, k = torch.zeros(2, 3, 500, 8), torch.randn(2, 3, 500, 8)
    v = torch.ones(2, 3, 500, 8)
    out = lk.attention(q, k, v, dropout_p=0.25, seed=11)  # of 500 keys each counts 1 / 375 or nothing
    assert abs(out.mean() - 1) < 0.002 and 0.02 < out[..., 0].std() < 0.032
    assert torch.equal(out, lk.attention(q, k, v, dropout_p=0.25, seed=11))
    assert not torch.equal(out, lk.attention(q, k, v, dropout_p=0.25, seed=12))


def test_a_seed_of_its_own_follows_torchs_generator():
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    torch.manual_seed(5)
    first, second = (lk.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(lk.attention(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)


MEMORY = """
import resource, torch, lspm_kernels as lk
def run(T, **options):
    q, k, v = (torch.zeros(1, 2, T, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(2, 1, T, requires_grad=True)
    mask = torch.ones(T, 1, dtype=torch.bool)
    slopes, sinks = torch.ones(2), torch.zeros(2, requires_grad=True)
    out, lse = lk.attention(q, k, v, bias=bias, mask=mask, alibi_slopes=slopes, softcap=1.0, dropout_p=0.1,
                            sinks=sinks, return_lse=True, **options)
    (out.sum() + lse.sum()).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(64)
before = peak()
run(6000)
run(6000, window=(100, 100))
print(peak() - before)
"""


def test_memory_is_linear_in_the_length_with_every_option():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB; one head's scores alone would be 137


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_a_compiled_dropout_draws_its_seed(mode):
    """Each call another one, the backward the forward's; a manual seed repeats it."""
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 60, 8))
    traced = torch.compile(lambda *t: lk.attention(*t, dropout_p=0.5), fullgraph=True, backend=mode)
    results = []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        results.append(traced(q, k, torch.ones_like(v)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert not torch.equal(traced(q, k, v), traced(q, k, v))
    (dv,) = torch.autograd.grad((out := traced(q, k, v)).sum(), v)
    assert abs((dv * v).sum() - out.sum()) < 1e-3  # out is linear in v, under the forward's dropout alone


@pytest.mark.every_backend
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(mode):
    torch._dynamo.reset()
    given, call = case(OPTIONS["everything"], SHAPES["small"], torch.float32)
    ours = torch.compile(lambda *t: call(lk.attention, *t), fullgraph=True, backend=mode)
    oracle.check(ours, lambda *t: call(reference.attention, *t), given)


def test_opcheck():
    q, k, v = (torch.randn(s).requires_grad_() for s in ((2, 4, 40, 16), (2, 2, 50, 16), (2, 2, 50, 24)))
    bias, sinks = torch.randn(1, 4, 40, 1, requires_grad=True), torch.randn(4, requires_grad=True)
    mask, slopes = torch.rand(2, 1, 1, 50) < 0.8, torch.rand(2, 4, 1, 1)
    options = (torch.tensor(5), None, None, 40, 50, 20, 0, False, 0.25, 2.0, 0.1, "cpu")
    given = (q, k, v, bias, mask, slopes, sinks, None, None, *options)
    torch.library.opcheck(torch.ops.lspm.attention.default, given)


@pytest.mark.every_backend
def test_masks_are_torchs():
    q, k, v = torch.randn(3, 2, 4, 40, 16)
    for mask in (torch.rand(2, 1, 40, 40) < 0.5, torch.randn(40, 40)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(lk.attention(q, k, v, mask=mask), expected)
    expected = F.scaled_dot_product_attention(q, k[:, :, :30], v[:, :, :30], is_causal=True)
    torch.testing.assert_close(
        lk.attention(q, k[:, :, :30], v[:, :, :30], causal=True, top_left=True), expected
    )


def test_a_head_without_its_sink():
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    oracle.check(
        lambda q, k, v, sinks: lk.attention(q, k, v, mask=mask, sinks=sinks),
        lambda q, k, v, sinks: reference.attention(q, k, v, mask=mask, sinks=sinks),
        [*torch.randn(3, 1, 2, 6, 16), torch.tensor([-torch.inf, 0.3])],
    )


@pytest.mark.every_backend
@pytest.mark.parametrize("side", [2**62 - 1, 2**63 - 1, 2**70])
def test_a_window_wider_than_any_text_hides_nothing(side):
    q, k, v = torch.randn(3, 2, 4, 40, 16)
    expected = lk.attention(q, k, v)
    for window in ((side, side), (None, side), (side, None)):
        assert torch.equal(lk.attention(q, k, v, window=window), expected)
