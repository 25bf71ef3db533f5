"""mlp and gated_mlp; what torch.compile and others make of them stands in test_mlp_operators.py."""

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import mlp as ops
from lspm_kernels.ops import swiglu
from lspm_kernels.reference import mlp as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 1), (6, 40), (2, 3, 37), (300, 64), (7,), (3, 0), (0, 5)]


def tensors(shape=(6, 40), dtype=torch.float32, bias_dtype=None, hidden=50, out=30):
    x, weight_in = torch.randn(shape), torch.randn(hidden, shape[-1]) / shape[-1] ** 0.5
    weight_out = torch.randn(out, hidden) / hidden**0.5
    biases = [torch.randn(n).to(bias_dtype or dtype) for n in (hidden, out)]
    x, weight_in, weight_out = (t.to(dtype) for t in (x, weight_in, weight_out))
    return [x, weight_in, biases[0], weight_out, biases[1]]


def gated(shape=(6, 40), dtype=torch.float32):
    x, weight_gate, _, weight_down, _ = tensors(shape, dtype)
    return [x, weight_gate, tensors(shape, dtype)[1], weight_down]


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_against_the_reference(activation, shape, dtype):
    ours, theirs = (lambda *t, f=f: f(*t, activation=activation) for f in (lk.mlp, reference.mlp))
    oracle.check(ours, theirs, tensors(shape, dtype))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_against_the_reference(activation, shape, dtype):
    ours, theirs = (lambda *t, f=f: f(*t, activation=activation) for f in (lk.gated_mlp, reference.gated_mlp))
    oracle.check(ours, theirs, gated(shape, dtype))


@pytest.mark.every_backend
@pytest.mark.parametrize("absent", [(2,), (4,), (2, 4)])
def test_biases_may_be_absent(absent):
    given = [None if i in absent else t for i, t in enumerate(tensors())]
    oracle.check(lk.mlp, reference.mlp, given)


@pytest.mark.every_backend
def test_float32_biases_beside_half_inputs():
    def plain(x, weight_in, bias_in, weight_out, bias_out):
        return reference.mlp(x, weight_in, bias_in, weight_out, bias_out.to(x.dtype))

    oracle.check(lk.mlp, plain, tensors(dtype=torch.bfloat16, bias_dtype=torch.float32))


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_empty(shape):
    oracle.check(lk.mlp, reference.mlp, tensors(shape))
    oracle.check(lk.gated_mlp, reference.gated_mlp, gated(shape))


@pytest.mark.every_backend
def test_inputs_that_are_not_contiguous():
    def turned(f):
        return lambda x, *t: f(x.transpose(0, 1), t[0].t(), t[1][::2], t[2].t(), t[3])

    given = [torch.randn(s) for s in ((4, 6, 40), (40, 50), (100,), (50, 30), (30,))]
    oracle.check(*map(turned, (lk.mlp, reference.mlp)), given)


@pytest.mark.every_backend
@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_for_one_input_alone(wanted):
    for ours, theirs, given in (
        (lk.mlp, reference.mlp, tensors()),
        (lk.gated_mlp, reference.gated_mlp, gated()),
    ):
        if wanted < len(given):
            given[wanted].requires_grad_()
            expected = torch.autograd.grad(theirs(*given).pow(2).sum(), given[wanted])
            actual = torch.autograd.grad(ours(*given).pow(2).sum(), given[wanted])
            torch.testing.assert_close(actual, expected)


def kept(f):
    """The sizes of what a forward keeps for its backward, without the parameters."""
    sizes = []
    x, *parameters = (t.requires_grad_() for t in tensors((64, 40)))
    known = {t.data_ptr() for t in (x, *parameters)}

    def note(t):
        if t.data_ptr() not in known:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        f(x, *parameters)
    return sizes


def test_one_hidden_tensor_is_kept():
    assert kept(lk.mlp) == [64 * 50]
    plain = kept(lambda x, a, b, c, d: F.linear(F.gelu(F.linear(x, a, b)), c, d))
    assert plain == [64 * 50] * 2


def test_same_bits_as_its_parts_without_a_gradient():
    x, weight_in, bias_in, weight_out, bias_out = tensors((64, 40))
    expected = F.linear(lk.bias_act(F.linear(x, weight_in), bias_in), weight_out, bias_out)
    assert torch.equal(lk.mlp(x, weight_in, bias_in, weight_out, bias_out), expected)


X, IN, BIAS, OUT = torch.ones(2, 4), torch.ones(6, 4), torch.ones(6), torch.ones(3, 6)
BAD = {
    "mlp: x must be a floating-point tensor of one dimension or more, got list": lambda: lk.mlp(
        [1.0], IN, None, OUT, None
    ),
    "mlp: weight_in must be a tensor of shape (*, 4), got (6, 5)": lambda: lk.mlp(
        X, torch.ones(6, 5), None, OUT, None
    ),
    "mlp: weight_out must be a tensor of shape (*, 6), got (6, 4)": lambda: lk.mlp(X, IN, None, IN, None),
    "mlp: weight_in must have x's dtype torch.float32, got torch.bfloat16": lambda: lk.mlp(
        X, IN.bfloat16(), None, OUT, None
    ),
    "mlp: weight_out must be on x's device cpu, got meta": lambda: lk.mlp(X, IN, None, OUT.to("meta"), None),
    "mlp: bias_in must be a tensor of shape (6,), got (3,)": lambda: lk.mlp(X, IN, BIAS[:3], OUT, None),
    "mlp: bias_out must have dtype torch.float32, got torch.float16": lambda: lk.mlp(
        X, IN, BIAS, OUT, BIAS[:3].half()
    ),
    "mlp: activation must be one of relu, silu, gelu, gelu_tanh, got None": lambda: lk.mlp(
        X, IN, BIAS, OUT, None, activation=None
    ),
    "gated_mlp: weight_up must be a tensor of shape (6, 4), got (5, 4)": lambda: lk.gated_mlp(
        X, IN, IN[:5], OUT
    ),
    "gated_mlp: weight_down must be a tensor of shape (*, 6), got float": lambda: lk.gated_mlp(
        X, IN, IN, 1.0
    ),
    "gated_mlp: activation must be one of silu, gelu, gelu_tanh, got 'relu'": lambda: lk.gated_mlp(
        X, IN, IN, OUT, activation="relu"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value) == message


def test_only_the_rows_of_the_tables_run():
    assert [row.name for row in (*ops.BACKENDS, *swiglu.BACKENDS)] == ["cpu", "triton"] * 2
    with pytest.raises(NotImplementedError, match="mlp: triton needs a tensor on cuda, got cpu"):
        lk.mlp(X, IN, BIAS, OUT, None, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="gated_mlp: cpu needs dtype float32, bfloat16, float16"):
        lk.gated_mlp(*(t.double() for t in (X, IN, IN, OUT)))
