"""attention: the public function, as every part of torch meets it, under every instruction set."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import attention as ops
from lspm_kernels.reference import attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, H_kv, T_q, T_k, D, Dv. The CPU kernels' tiles have 256 keys and 32, 64 or 256 queries.
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "one query and key": (2, 2, 2, 1, 1, 64, 64),
    "decoding": (2, 2, 2, 1, 300, 64, 64),
    "one key": (2, 3, 3, 19, 1, 7, 128),
    "no multiple of a tile": (1, 2, 2, 141, 141, 64, 64),
    "several tiles": (1, 2, 1, 530, 530, 16, 16),
    "fewer queries than keys": (2, 2, 2, 70, 300, 16, 24),
    "more queries than keys": (1, 3, 1, 330, 270, 80, 7),
    "dims of 1": (2, 2, 2, 60, 50, 1, 1),
    "odd dims": (1, 2, 2, 33, 129, 7, 80),
    "dims of 128": (1, 2, 1, 130, 130, 128, 128),
    "dims of 256": (1, 1, 1, 40, 150, 256, 256),
    "grouped heads": (2, 6, 2, 90, 90, 32, 64),
    "one key head": (2, 4, 1, 64, 256, 64, 16),
    "many heads": (6, 4, 4, 140, 140, 16, 16),
    "no batch": (0, 2, 2, 5, 5, 8, 8),
    "no heads": (2, 0, 1, 5, 5, 8, 8),
    "no queries": (1, 2, 1, 0, 5, 8, 8),
    "no keys": (1, 2, 1, 5, 0, 8, 8),
}


def tensors(shape=(2, 4, 2, 40, 50, 16, 24), dtype=torch.float32):
    B, H, H_kv, T_q, T_k, D, Dv = shape
    sizes = (B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, Dv)
    return [torch.randn(size).to(dtype) for size in sizes]


def check(given, view=lambda *t: t, **options):
    """Holds attention(*view(*given)) to the oracle's rule."""
    forms = (lambda *t, f=f: f(*view(*t), **options) for f in (lk.attention, reference.attention))
    oracle.check(*forms, given)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape, causal, dtype):
    check(tensors(SHAPES[shape], dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for shape in ("decoding", "several tiles", "more queries than keys", "odd dims", "dims of 128"):
        for causal in (False, True):
            check(tensors(SHAPES[shape], dtype), causal=causal)


@pytest.mark.every_backend
@pytest.mark.parametrize("scale", [1.0, 0.02, 0.0, -0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(scale, dtype):
    check(tensors(dtype=dtype), scale=scale, causal=True)


VIEWS = {
    "packed projection": ((2, 40, 3, 4, 16), lambda qkv: qkv.permute(2, 0, 3, 1, 4)),
    "heads inside": ((3, 2, 40, 4, 16), lambda qkv: qkv.transpose(2, 3)),
    "rows apart": ((3, 2, 4, 80, 16), lambda qkv: qkv[:, :, :, ::2]),
    "expanded": ((3, 1, 1, 40, 16), lambda qkv: qkv.expand(3, 2, 4, 40, 16)),
    "misaligned": ((3, 2, 4, 40, 17), lambda qkv: qkv[..., 1:]),
    "last dimension apart": ((3, 2, 4, 40, 32), lambda qkv: qkv[..., ::2]),
}


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name, dtype):
    size, view = VIEWS[name]
    check([torch.randn(size).to(dtype)], view, causal=True)


@pytest.mark.parametrize("name", VIEWS)
def test_only_a_last_dimension_with_gaps_is_copied(name):
    size, view = VIEWS[name]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        out = lk.attention(*view(torch.randn(size)), causal=True)
        joined = out.transpose(1, 2).reshape(2, 40, -1)
    assert joined.data_ptr() == out.data_ptr()
    assert ("aten::copy_" in {event.key for event in profile.events()}) == (name == "last dimension apart")


@pytest.mark.every_backend
@pytest.mark.parametrize("factor", [1e-30, 1e-4, 30.0, 1e4])
@pytest.mark.parametrize("causal", [False, True])
def test_magnitudes(factor, causal):
    q, k, v = tensors((1, 2, 2, 70, 150, 16, 16))
    check([q * factor, k, v], causal=causal)
    check([q, k, v * factor], causal=causal)


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("options", [{}, {"mask": torch.ones(70, 300, dtype=torch.bool)}], ids=["", "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spreads_as_in_the_reference(which, value, options, dtype):
    given = tensors((1, 2, 1, 70, 300, 16, 16), dtype)
    given[which][0, 0, 3, 5] = value
    expected = oracle.outputs_and_gradients(lambda *t: reference.attention(*t, **options), given)
    for name, actual in oracle.outputs_and_gradients(lambda *t: lk.attention(*t, **options), given).items():
        assert torch.equal(actual.isfinite(), expected[name].isfinite()), name


def test_what_is_not_finite_stays_where_a_query_sees_it():
    given = tensors((1, 2, 2, 300, 300, 16, 16))
    clean = lk.attention(*given, causal=True)
    for x in given:
        x[:, :, 299] = float("nan")
    out = lk.attention(*given, causal=True)
    assert out[:, :, 299].isnan().all()
    assert torch.equal(out[:, :, :256], clean[:, :, :256])


@pytest.mark.every_backend
@pytest.mark.parametrize("hiding", ["causal", "bias", "mask"])
def test_a_query_that_sees_no_key(hiding):
    given = tensors((1, 2, 2, 400, 100, 16, 16))
    added = torch.zeros(400, 100).index_fill_(0, torch.arange(300), -torch.inf)
    hides = {"causal": True} if hiding == "causal" else {hiding: added}
    inputs = [x.requires_grad_() for x in (*given, *([added] if hiding == "bias" else []))]
    out, lse = lk.attention(*given, **hides, return_lse=True)
    dq, *gradients = torch.autograd.grad(out.sum(), inputs)
    assert (out[:, :, :300] == 0).all() and (dq[:, :, :300] == 0).all()
    assert (lse[:, :, :300] == -torch.inf).all() and all(g.isfinite().all() for g in gradients)
    assert (out[:, :, 300:] != 0).any(-1).all()


def test_one_query_that_sees_no_key():
    q, k, v = tensors((1, 2, 2, 1, 300, 16, 16))
    for hides in ({"bias": torch.full((300,), -torch.inf)}, {"mask": torch.zeros(300, dtype=torch.bool)}):
        out, lse = lk.attention(q, k, v, **hides, return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.every_backend
def test_lse():
    q, k, v = tensors((2, 4, 2, 80, 50, 16, 24))
    _, lse = lk.attention(q, k, v, causal=True, scale=0.25, return_lse=True)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    scores.masked_fill_(torch.ones(80, 50, dtype=torch.bool).triu(50 - 80 + 1), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["several tiles", "more queries than keys", "many heads"])
def test_same_bits_for_any_number_of_threads(shape, dtype):
    def run(threads):
        torch.set_num_threads(threads)
        return oracle.outputs_and_gradients(lambda *t: lk.attention(*t, causal=True), given)

    given = tensors(SHAPES[shape], dtype)
    results = [run(threads) for threads in (1, 2, 3, 2)]
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


MEMORY = """
import resource, torch, lspm_kernels as lk
def run(T, dtype):
    q, k, v = (torch.zeros(1, 2, T, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    lk.attention(q, k, v, causal=True).sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for dtype in (torch.float32, torch.bfloat16): run(64, dtype)
before = peak()
for dtype in (torch.float32, torch.bfloat16): run(8192, dtype)
print(peak() - before)
"""


def test_memory_is_linear_in_the_length():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB; one head's scores alone would be 256


@pytest.mark.every_backend
@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_compile(mode):
    torch._dynamo.reset()
    forms = [lambda q, k, v, f=f: f(q.sin(), k, v, causal=True) for f in (lk.attention, reference.attention)]
    ours = torch.compile(forms[0], fullgraph=True, backend=mode)
    for shape in ((2, 4, 2, 40, 50, 16, 24), (2, 4, 2, 30, 60, 16, 24), (3, 4, 2, 30, 30, 16, 24)):
        oracle.check(ours, forms[1], tensors(shape))


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in tensors())
    extras, sizes, options = [None] * 7, (40, 50), (-1, 0, False, 0.25, 0.0, 0.0, "cpu")
    given = (q, k, v, *extras, None, None, *sizes, *options)
    torch.library.opcheck(torch.ops.lspm.attention.default, given)
    out, lse, saved = (x.detach() for x in torch.ops.lspm.attention(*given))
    given = (
        torch.randn_like(out),
        torch.randn_like(lse),
        *(x.detach() for x in (q, k, v)),
        *extras,
        out,
        saved,
    )
    torch.library.opcheck(torch.ops.lspm.attention_backward.default, (*given, False, *sizes, *options))


@pytest.mark.every_backend
def test_second_derivative_is_an_error():
    q, k, v = (x.requires_grad_() for x in tensors())
    (gradient,) = torch.autograd.grad(lk.attention(q, k, v).pow(2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward: a second derivative is not"):
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.every_backend
def test_func_transforms():
    many = [torch.stack([x, x + 1, x * 2]) for x in tensors()]
    actual, expected = (
        torch.vmap(torch.func.grad(lambda *t, f=f: f(*t).pow(3).sum(), argnums=(0, 1, 2)))(*many)
        for f in (lk.attention, reference.attention)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_computes_in_its_dtype(dtype):
    q, k, v = (x.requires_grad_() for x in tensors((2, 4, 4, 40, 40, 16, 16)))
    for f in (lk.attention, torch.compile(lk.attention, fullgraph=True)):
        with torch.autocast("cpu", dtype):
            out = f(q, k.to(dtype), v)
            assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
        assert torch.autograd.grad(out.float().sum(), k)[0].dtype == torch.float32


def test_export_fake_and_meta():
    class Module(torch.nn.Module):
        def forward(self, *t):
            return lk.attention(*t)

    given = tensors()
    program = torch.export.export(Module(), tuple(given))
    assert "lspm.attention" in str(program.graph)
    torch.testing.assert_close(program.module()(*given), lk.attention(*given))
    with FakeTensorMode() as mode:
        assert lk.attention(*[mode.from_tensor(x) for x in given]).shape == (2, 4, 40, 24)
    assert lk.attention(*[x.to("meta") for x in given]).is_meta


def test_one_export_serves_any_number_of_queries():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return lk.attention(q, k, v, causal=True)

    given, T = tensors((2, 4, 2, 40, 40, 16, 24)), torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(Module(), tuple(given), dynamic_shapes=[{2: T}] * 3)
    for length in (2, 40, 64, 65, 300):
        other = tensors((2, 4, 2, length, length, 16, 24))
        torch.testing.assert_close(program.module()(*other), Module()(*other))


@pytest.mark.every_backend
def test_defaults_are_torchs():
    given = tensors((2, 4, 2, 40, 40, 16, 24))
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(*given, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(lk.attention(*given, causal=causal), expected)


def test_only_the_rows_of_the_table_run():
    given = tensors()
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton", "cuda"]
    message = "attention: backend must be one of cpu, triton, cuda, reference, got 'fast'"
    with pytest.raises(ValueError, match=message):
        lk.attention(*given, backend="fast")
    with pytest.raises(NotImplementedError, match="attention: triton needs a tensor on cuda, got cpu"):
        lk.attention(*given, backend="triton")
    with pytest.warns(
        lk.FallbackWarning, match="attention: cpu needs dtype float32, bfloat16, float16, got "
    ):
        lk.attention(*[x.double() for x in given])
    with lk.use_backend("reference"):
        assert torch.equal(lk.attention(*given), reference.attention(*given))
