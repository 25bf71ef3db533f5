"""layer_norm, rms_norm and their residual forms: the public functions, as every part of torch meets them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import layer_norm as ops
from lspm_kernels.reference import layer_norm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 1), (6, 40), (2, 3, 37), (300, 257), (33, 768), (7,), (3, 20_000)]
# name: ours, the reference, and what each takes of (x, residual, weight, bias).
FORMS = {
    "layer_norm": (
        lambda x, r, w, b: lk.layer_norm(x, w, b),
        lambda x, r, w, b: reference.layer_norm(x, w, b),
    ),
    "rms_norm": (
        lambda x, r, w, b: lk.rms_norm(x, w, 1e-6),
        lambda x, r, w, b: reference.rms_norm(x, w, 1e-6),
    ),
    "add_layer_norm": (lk.add_layer_norm, reference.add_layer_norm),
    "add_rms_norm": (
        lambda x, r, w, b: lk.add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w, b: reference.add_rms_norm(x, r, w, 1e-6),
    ),
}


def tensors(shape=(6, 40), dtype=torch.float32, weight_dtype=None, weight=True, bias=True):
    x, residual = torch.randn(2, *shape).to(dtype)
    w, b = torch.randn(2, shape[-1]).to(weight_dtype or dtype)
    return [x, residual, w if weight else None, b if bias else None]


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(form, shape, dtype):
    oracle.check(*FORMS[form], tensors(shape, dtype))


@pytest.mark.every_backend
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_weight_and_bias_may_be_absent(form, weight, bias):
    oracle.check(*FORMS[form], tensors((9, 100), weight=weight, bias=bias))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_weights_beside_half_inputs(dtype):
    oracle.check(*FORMS["add_layer_norm"], tensors((9, 100), dtype, torch.float32))
    oracle.check(*FORMS["layer_norm"], tensors((9, 100), dtype, torch.float32, weight=False))


@pytest.mark.every_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(form, shape):
    oracle.check(*FORMS[form], tensors(shape))


@pytest.mark.every_backend
@pytest.mark.parametrize("kept", [0, 1])
def test_gradient_of_one_output_alone(kept):
    ours, theirs = FORMS["add_layer_norm"]
    oracle.check(lambda *t: ours(*t)[kept], lambda *t: theirs(*t)[kept], tensors())


@pytest.mark.every_backend
def test_frozen_weights_get_no_gradient():
    x, residual, weight, bias = tensors()
    x.requires_grad_()
    bias.requires_grad_()
    lk.add_layer_norm(x, residual, weight, bias)[0].sum().backward()
    assert weight.grad is None and residual.grad is None
    torch.testing.assert_close(bias.grad, torch.full((40,), 6.0))


@pytest.mark.every_backend
def test_a_gradient_for_x_alone():
    x, _, weight, bias = tensors()
    y = lk.layer_norm(x.requires_grad_(), weight, bias)
    expected = torch.autograd.grad(reference.layer_norm(x, weight, bias).pow(2).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.pow(2).sum(), x), expected)


@pytest.mark.every_backend
@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_are_not_contiguous(form):
    def turned(f):
        return lambda x, r, w, b: f(x.t(), r.t(), w[::2], b[::2])

    x, residual = torch.randn(2, 40, 6)
    weight, bias = torch.randn(2, 80)
    oracle.check(*map(turned, FORMS[form]), [x, residual, weight, bias])


@pytest.mark.every_backend
def test_misaligned_data():
    flat = torch.randn(4 * 64 + 1)
    x = flat[1:].view(4, 64)
    oracle.check(*FORMS["layer_norm"], [x, None, torch.randn(65)[1:], None])


@pytest.mark.every_backend
@pytest.mark.parametrize("form", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e15])
def test_magnitudes(form, scale):
    x, _, weight, bias = tensors((9, 100))
    oracle.check(*FORMS[form], [x * scale, None, weight, bias], gradients=False)


@pytest.mark.every_backend
def test_a_large_mean_cancels_nothing():
    x, _, weight, bias = tensors((9, 1000))
    oracle.check(*FORMS["layer_norm"], [x + 1000, None, weight, bias], gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(value):
    x, _, weight, bias = tensors((4, 100))
    clean = lk.layer_norm(x, weight, bias)
    x[2, 17] = value
    y = lk.layer_norm(x, weight, bias)
    assert y[2].isnan().all()
    torch.testing.assert_close(y[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=0)
    assert torch.equal(y.isnan(), F.layer_norm(x, (100,), weight, bias).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5003, 96), (2050, 1024), (8193, 513)])
def test_same_bits_for_any_number_of_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(oracle.outputs_and_gradients(lk.add_layer_norm, tensors(shape, dtype)))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for form in FORMS.values():
        for shape in [(5, 77), (70, 1), (2, 2000)]:
            oracle.check(*form, tensors(shape, dtype))
    assert not lk.layer_norm(torch.full((3, 3001), 1.1, dtype=dtype), eps=1e-12).any()  # each is the mean


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_that_are_streamed(dtype):
    cols = 1024 if dtype == torch.float32 else 2048  # a little more than 4 MiB
    oracle.check(*FORMS["add_layer_norm"], tensors((1031, cols), dtype))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_defaults_are_torchs(dtype):
    x, _, weight, bias = tensors(dtype=dtype)
    torch.testing.assert_close(lk.layer_norm(x, weight, bias), F.layer_norm(x, (40,), weight, bias))
    torch.testing.assert_close(lk.rms_norm(x * 1e-3, weight), F.rms_norm(x * 1e-3, (40,), weight))


def test_autocast_on_a_gpu_is_torchs(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")  # which needs a GPU
    with FakeTensorMode():
        x, residual, weight, bias = (t.bfloat16().to("cuda") for t in tensors())
        y, total = lk.add_layer_norm(x, residual, weight, bias, backend="reference")
    assert y.dtype == total.dtype == torch.float32  # as F.layer_norm gives on a GPU, bfloat16 weights or not


BAD = {
    "layer_norm: x must be a floating-point tensor of one dimension or more, got list": ([1.0],),
    "layer_norm: x must be a floating-point tensor of one dimension or more, got () torch.float32": (
        torch.ones(()),
    ),
    "layer_norm: x must be a floating-point tensor of one dimension or more, got (2, 3) torch.int64": (
        torch.ones(2, 3, dtype=torch.int64),
    ),
    "layer_norm: weight must be a tensor of shape (4,), got (3,)": (torch.ones(2, 4), torch.ones(3)),
    "layer_norm: weight must be a tensor of shape (4,), got float": (torch.ones(2, 4), 1.0),
    "layer_norm: bias must be a tensor of shape (4,), got (1, 4)": (torch.ones(2, 4), None, torch.ones(1, 4)),
    "layer_norm: weight must have dtype torch.float32, got torch.float16": (
        torch.ones(2, 4),
        torch.ones(4).half(),
    ),
    "layer_norm: weight must have dtype torch.bfloat16 or torch.float32, got torch.float16": (
        torch.ones(2, 4).bfloat16(),
        torch.ones(4).half(),
    ),
    "layer_norm: bias must have dtype torch.float32, got torch.bfloat16": (
        torch.ones(2, 4).bfloat16(),
        torch.ones(4),
        torch.ones(4).bfloat16(),
    ),
    "layer_norm: weight must be on x's device cpu, got meta": (
        torch.ones(2, 4),
        torch.ones(4, device="meta"),
    ),
}


@pytest.mark.parametrize("eps", ["x", -1.0, float("inf"), float("nan"), (1e-5,)], ids=str)
def test_bad_eps(eps):
    x, residual, weight, bias = tensors()
    for op, args in {
        "layer_norm": (x, weight, bias, eps),
        "rms_norm": (x, weight, eps),
        "add_layer_norm": (x, residual, weight, bias, eps),
        "add_rms_norm": (x, residual, weight, eps),
    }.items():
        with pytest.raises(ValueError) as error:
            getattr(lk, op)(*args)
        assert str(error.value) == f"{op}: eps must be finite and at least 0, got {eps!r}"


def test_eps_may_be_a_tensor():
    x, _, weight, bias = tensors()
    eps = torch.tensor(0.5)
    assert torch.equal(lk.layer_norm(x, weight, bias, eps), lk.layer_norm(x, weight, bias, 0.5))


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        lk.layer_norm(*BAD[message])
    assert str(error.value) == message


def test_bad_residual():
    x, residual, weight, bias = tensors()
    message = r"add_layer_norm: residual must be a tensor of x's shape \(6, 40\), got \(40,\)"
    with pytest.raises(ValueError, match=message):
        lk.add_layer_norm(x, residual[0], weight, bias)
    with pytest.raises(ValueError, match="add_layer_norm: residual must be a floating-point tensor, got"):
        lk.add_layer_norm(x, residual.long(), weight, bias)
    with pytest.raises(ValueError, match="add_rms_norm: residual must be on x's device cpu, got meta"):
        lk.add_rms_norm(x, residual.to("meta"), weight)


def test_the_binding_refuses_what_would_touch_other_memory():
    x, _, weight, bias = tensors()
    y, statistics = torch.empty_like(x), torch.empty(2, 6)
    forward = compiled.cpu.layer_norm_forward
    for message, wrong in {
        "y must have another number of elements": (x, None, weight, bias, None, y[:3], statistics),
        "weight must have another number of elements": (x, None, weight[:7], bias, None, y, statistics),
        "x must be contiguous": (torch.ones(40, 6).t(), None, weight, bias, None, y, statistics),
        "y must have the dtype that the contract names": (
            x,
            None,
            weight,
            bias,
            None,
            y.double(),
            statistics,
        ),
        "sum must be there exactly where residual is": (x, x, weight, bias, None, y, statistics),
        "statistics must have another number": (x, None, weight, bias, None, y, statistics[:1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(*wrong, 1e-5, True, 1)


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="layer_norm: triton needs a tensor on cuda, got cpu"):
        lk.layer_norm(torch.ones(2, 4), backend="triton")
    with pytest.warns(
        lk.FallbackWarning, match="layer_norm: cpu needs dtype float32, bfloat16, float16, got float64"
    ):
        lk.layer_norm(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_a_sum_of_two_dtypes(name, dtypes, weight_dtype):
    if weight_dtype not in (dtypes[0], torch.float32):
        pytest.skip("no weight that x may have")
    x, residual = (torch.randn(3, 40).to(dtype) for dtype in dtypes)
    weight = torch.randn(40).to(weight_dtype)
    oracle.check(
        lambda *t: getattr(lk, name)(*t, eps=1e-5),
        lambda *t: getattr(reference, name)(
            *(u.to(torch.promote_types(u.dtype, torch.float32)) for u in t), eps=1e-5
        ),
        (x, residual, weight),
    )
