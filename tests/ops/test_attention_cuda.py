"""The CUDA kernels of attention, executed on the CPU (tests/cuda_on_cpu) against the float64 reference."""

import ctypes

import pytest
import torch
from cuda_on_cpu.attention import FLAVOURS, loaded, on
from cuda_on_cpu.library import KernelError, run_under_asan, with_long
from ops import test_attention_options

import oracle
from lspm_kernels.reference import attention as reference

BF16, F16 = torch.bfloat16, torch.float16
# B, H, H_kv, T_q, T_k, D, Dv. A tile has 64 or 128 queries and 32 to 128 keys.
SHAPES = {
    "small": (2, 4, 2, 37, 50, 16, 24),
    "several tiles": (1, 4, 2, 132, 140, 64, 64),
    "more queries than keys": (1, 2, 2, 140, 21, 32, 64),
    "odd dims": (2, 2, 1, 20, 33, 7, 20),
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "no keys": (1, 2, 1, 5, 0, 16, 16),
    "decoding": (2, 4, 1, 1, 90, 64, 64),
    "128 dims": (1, 4, 2, 70, 140, 128, 72),
    "256 dims": (1, 4, 2, 70, 75, 136, 256),
}
EVERYTHING = {
    "bias": (2, 2, 1, 1), "mask": (2, 0, 0, 1), "slopes": 1, "softcap": 5.0, "dropout_p": 0.2, "seed": 3,
    "sinks": True, "window": (40, 20), "scale": 0.3,
}  # fmt: skip
# shape, dtype, options
CASES = {
    "plain": ("several tiles", BF16, {}),
    "causal": ("several tiles", F16, {"causal": True}),
    "padded": ("small", BF16, {"causal": True}),
    "more queries than keys": ("more queries than keys", BF16, {"causal": True}),
    "odd dims": ("odd dims", BF16, {"causal": True}),
    "one element": ("one element", BF16, {}),
    "no keys": ("no keys", BF16, {"sinks": True}),
    "decoding": ("decoding", BF16, {"window": (50, None)}),
    "window": ("several tiles", BF16, {"window": (33, 7)}),
    "window to the left": ("several tiles", F16, {"window": (20, None)}),
    "top-left causal": ("small", BF16, {"causal": True, "top_left": True}),
    "negative scale": ("small", BF16, {"scale": -0.4}),
    "bias": ("small", BF16, {"bias": (2, 2, 1, 1)}),
    "bias of a row": ("small", BF16, {"bias": (2, 0, 1, 0)}),
    "bias of a key": ("more queries than keys", BF16, {"bias": (2, 0, 0, 1), "window": (9, 30)}),
    "mask": ("small", BF16, {"mask": (2, 0, 1, 1)}),
    "added mask": ("small", BF16, {"added": (0, 2, 1, 1)}),
    "slopes": ("small", BF16, {"slopes": 2, "causal": True}),
    "softcap": ("small", BF16, {"softcap": 2.0}),
    "dropout": ("several tiles", BF16, {"dropout_p": 0.3, "seed": 2**62 + 12345}),
    "sinks": ("more queries than keys", BF16, {"sinks": True, "causal": True}),
    "everything": ("several tiles", BF16, EVERYTHING),
    "everything in f16": ("several tiles", F16, EVERYTHING),
    "128 dims": ("128 dims", BF16, {"causal": True}),
    "128 dims in f16": ("128 dims", F16, {"window": (50, 9)}),
    "everything with 128 dims": ("128 dims", BF16, EVERYTHING),
    "everything with 128 dims in f16": ("128 dims", F16, EVERYTHING),
    "256 dims": ("256 dims", BF16, {"causal": True}),
    "256 dims in f16": ("256 dims", F16, {"window": (50, 9)}),
    "everything with 256 dims": ("256 dims", BF16, EVERYTHING),
    "everything with 256 dims in f16": ("256 dims", F16, EVERYTHING),
}


@pytest.fixture(params=with_long(FLAVOURS))
def library(request):
    yield from loaded(request.param)


@pytest.fixture
def all_of_ptx():
    yield from loaded("ptxcheck", "")


def case(name):
    """The tensors that get a gradient, and a function of (attention, *tensors)."""
    shape, dtype, options = CASES[name]
    options, more = dict(options), {}
    if kinds := options.pop("bias", None):  # it has no gradient here
        B, H, _, T_q, T_k, *_ = SHAPES[shape]
        more["bias"] = torch.randn(test_attention_options.broadcast(kinds, (B, H, T_q, T_k))).to(dtype)
    given, plain = test_attention_options.case(options, SHAPES[shape], dtype)

    def call(f, *t):
        bias = {name: x.to(t[0].dtype) for name, x in more.items()}
        return shown(*plain(f, *t, **bias, return_lse=True))

    return given, call


def shown(out, lse):
    assert not lse.isnan().any()
    return out, torch.where(lse.isfinite(), lse, 0.0)  # where no key is seen, lse has no gradient


def check(library, name):
    given, call = case(name)
    oracle.check(*(lambda *t, f=f: call(f, *t) for f in (on(library), reference.attention)), given)


def skip_what_is_not_translated(library, name):
    shape, dtype, options = CASES[name]
    if library.flavour == "ptxcheck" and (SHAPES[shape][-1] > 64 or (dtype, options) == (F16, EVERYTHING)):
        pytest.skip("this PTX is not translated, to save time; make test-long does")


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(library, name):
    skip_what_is_not_translated(library, name)
    check(library, name)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_all_of_the_ptx(all_of_ptx, name):
    check(all_of_ptx, name)


@pytest.mark.parametrize(
    "size, view",
    [
        ((2, 40, 3, 4, 16), lambda qkv: qkv.permute(2, 0, 3, 1, 4)),
        ((3, 2, 4, 80, 17), lambda qkv: qkv[:, :, :, ::2, 1:]),
        ((3, 1, 1, 40, 16), lambda qkv: qkv.expand(3, 2, 4, 40, 16)),
    ],
    ids=["packed projection", "misaligned rows apart", "expanded"],
)
def test_strides(library, size, view):
    forms = (lambda t, f=f: f(*view(t), causal=True) for f in (on(library), reference.attention))
    oracle.check(*forms, [torch.randn(size).bfloat16()])


def test_strides_of_what_is_added(library):
    q, k, v = torch.randn(3, 2, 2, 20, 16).bfloat16()
    bias, mask = torch.randn(2, 20, 2, 40), torch.rand(20, 20) < 0.7
    forms = (
        lambda *t, f=f: f(*t, bias=bias.transpose(1, 2)[..., ::2].transpose(2, 3), mask=mask.T[None, None])
        for f in (on(library), reference.attention)
    )
    oracle.check(*forms, [q, k, v])


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "dout", "dq", "dk", "dv"])
def test_misaligned_pointers(library, name):
    given, call = case("padded")
    forms = (lambda *t, f=f: call(f, *t) for f in (on(library, misaligned=(name,)), reference.attention))
    oracle.check(*forms, given)


def test_tiles_outside_the_window_are_not_read(library):
    q, k, v = (torch.randn(1, 2, 384, 16).bfloat16() for _ in range(3))
    far = torch.ones(384, dtype=torch.bool)
    far[64:256] = False  # tiles of queries that begin at 128 see keys from 120 to 255
    poisoned = [x.clone().requires_grad_() for x in (q, k, v)]
    for x in poisoned[1:]:
        x.data[:, :, far] = float("nan")
    out = on(library)(*poisoned, window=(8, 0))
    assert out[:, :, 128:256].isfinite().all()
    out[:, :, 128:256].sum().backward()
    assert poisoned[0].grad[:, :, 128:256].isfinite().all()

    poisoned = [x.clone().requires_grad_() for x in (q, k, v)]
    poisoned[0].data[:, :, 320:] = float("nan")  # keys up to 255 are seen by queries up to 263
    on(library)(*poisoned, window=(8, 0)).sum().backward()
    for x in poisoned[1:]:
        assert x.grad[:, :, :256].isfinite().all() and x.grad[:, :, 320:].isnan().all()


@pytest.mark.parametrize("hiding", ["causal", "bias"])
def test_a_query_that_sees_no_key(library, hiding):
    given, _ = case("more queries than keys")
    q, k, v = (x.requires_grad_() for x in given)
    added = torch.zeros(1, 1, 140, 21).index_fill_(2, torch.arange(119), -torch.inf)
    hides = {"causal": True} if hiding == "causal" else {"bias": added}
    out, lse = on(library)(q, k, v, **hides, return_lse=True)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert (out[:, :, :119] == 0).all() and (dq[:, :, :119] == 0).all()
    assert (lse[:, :, :119] == -torch.inf).all() and lse[:, :, 119:].isfinite().all()


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_same_bits_under_any_schedule(library, name):
    given, call = case(name)
    results = []
    for seed in range(3):
        library.configure(seed)
        results.append(oracle.outputs_and_gradients(lambda *t: call(on(library), *t), given))
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_special_values(library, value):
    given, _ = case("top-left causal")
    given[0][0, 0, 3, 5] = value
    given[2][1, 1, 4, 2] = value
    forms = (lambda *t, f=f: f(*t, causal=True) for f in (on(library), reference.attention))
    oracle.check(*forms, given, gradients=False)


def test_huge_scores(library):
    """2^41 for the key alike, where the rounding of a maximum spans more than float32's exponents do."""
    q = torch.eye(16).bfloat16()[None, None] * 2**20 * 1.7  # whose square times a scale is rounded
    v = torch.randn(1, 1, 16, 16).bfloat16()
    for scale in (1.0, 0.3, 0.7):
        assert torch.equal(on(library)(q, q, v, scale=scale), v)


@pytest.mark.parametrize("name", ["causal", "everything", "128 dims", "256 dims"])
def test_shared_memory_without_bank_conflicts(library, name):
    skip_what_is_not_translated(library, name)
    given, call = case(name)
    library.counters()
    oracle.outputs_and_gradients(lambda *t: call(on(library), *t), given)
    counters = library.counters()
    assert counters["mma"] and counters["cp_async"] and not counters["ldmatrix_conflicts"]


def test_launches_on_the_given_device_and_stream(library):
    stream = ctypes.c_void_p(0x1230)
    q = torch.randn(1, 1, 2, 8).bfloat16().requires_grad_()
    on(library, where=(2, stream))(q, q, q).sum().backward()
    assert library.c.emu_last_device() == 2
    assert library.c.emu_last_stream() == stream.value
    assert library.c.emu_current_device() == 0


def test_messages(library):
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(KernelError, match=r"^attention_forward: dtype must be bf16 or f16, got 0$"):
        on(library)(q, q, q)
    with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid"):
        on(library, where=(17, None))(*[q.bfloat16()] * 3)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    cases = "odd or causal or everything or strides or pointers or decoding"
    run_under_asan("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", cases, "-m", "not long")
