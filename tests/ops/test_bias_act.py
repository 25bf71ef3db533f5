"""bias_act and bias_gelu; what torch.compile and others make of them stands in test_mlp_operators.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import bias_act as ops
from lspm_kernels.reference import bias_act as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 1), (6, 40), (2, 3, 37), (300, 257), (33, 768), (7,), (3, 20_000)]
ACTIVATIONS = tuple(ops.ACTIVATIONS)
EACH = pytest.mark.parametrize("activation", ACTIVATIONS)
# Where the rule of rounding asks for most: around 0, across the tails, where nothing is left, and beyond.
LARGE = [sign * 10.0**power for sign in (1, -1) for power in (2, 4, 8, 15)]


def function(f, activation):
    return lambda x, bias: f(x, bias, activation)


def check(inputs, activation="gelu", **options):
    oracle.check(
        function(lk.bias_act, activation), function(reference.bias_act, activation), inputs, **options
    )


def tensors(shape=(6, 40), dtype=torch.float32, bias_dtype=None):
    return [torch.randn(shape).mul(2).to(dtype), torch.randn(shape[-1:]).to(bias_dtype or dtype)]


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@EACH
def test_against_the_reference(activation, shape, dtype):
    check(tensors(shape, dtype), activation)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (37,), (5, 100), (2, 3, 64), (70_001,)])
@EACH
def test_without_a_bias(activation, shape, dtype):
    check([tensors(shape, dtype)[0], None], activation)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_over_the_whole_range(activation, dtype):
    x = torch.cat((torch.linspace(-20, 20, 40_001), torch.linspace(-1, 1, 2001) * 1e-3, torch.tensor(LARGE)))
    check([x.to(dtype).clamp(-6e4, 6e4) if dtype == torch.float16 else x.to(dtype), None], activation)


@pytest.mark.every_backend
@EACH
def test_small_values_keep_their_digits(activation):
    x = torch.linspace(-1, 1, 2001).double().mul(1e-20)
    x = x[x != 0]
    for sign in (1, -1):
        y = lk.bias_act((x * sign).float(), None, activation).double()
        truth = reference.bias_act((x * sign).float().double(), None, activation)
        torch.testing.assert_close(y, truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def check_kinds(given, activation):
    """Values and gradients are NaN or infinite where the definition in float64 is.

    Plain PyTorch's gelu of float32 may be NaN where that is inf.
    """
    wide = [t if t is None else t.double() for t in given]
    actual = oracle.outputs_and_gradients(function(lk.bias_act, activation), given)
    truth = oracle.outputs_and_gradients(function(reference.bias_act, activation), wide)
    for name, t in truth.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual[name]), kind(t)), (name, kind)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_what_is_not_finite(activation, dtype):
    x = torch.randn(3, 40)
    x[0, 5], x[1, 7], x[2, 9], x[2, 33] = float("nan"), float("inf"), -float("inf"), 0.0
    check_kinds([x.to(dtype), None], activation)
    check_kinds([x.to(dtype), torch.zeros(40, dtype=dtype)], activation)


@pytest.mark.every_backend
def test_a_huge_value_has_the_slope_that_it_has():
    """Plain PyTorch squares x in gelu's tanh form: from 1.8e19 on its gradient is NaN."""
    x = torch.tensor([1e25, -1e25, 1e38, -1e38], requires_grad=True)
    for approximate in ("none",) if torch.get_default_device().type == "cuda" else ("none", "tanh"):
        y = lk.bias_gelu(x, approximate=approximate)
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_float32_bias_beside_half_inputs(dtype):
    check(tensors((70, 100), dtype, torch.float32))
    check(tensors((70, 7), dtype, torch.float32), "silu")


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape):
    check(tensors(shape))


@pytest.mark.every_backend
def test_a_gradient_for_one_input_alone():
    x, bias = tensors()
    for wanted, other in ((x, bias), (bias, x)):
        wanted.requires_grad_()
        ours = torch.autograd.grad(lk.bias_act(x, bias).pow(2).sum(), wanted)[0]
        theirs = torch.autograd.grad(reference.bias_act(x, bias).pow(2).sum(), wanted)[0]
        torch.testing.assert_close(ours, theirs)
        assert other.grad is None
        wanted.requires_grad_(False)


@pytest.mark.every_backend
def test_inputs_that_are_not_contiguous():
    def turned(f):
        return lambda x, bias: f(x.t(), bias[::2], "gelu")

    oracle.check(*map(turned, (lk.bias_act, reference.bias_act)), [torch.randn(40, 6), torch.randn(80)])


@pytest.mark.every_backend
def test_misaligned_data():
    flat = torch.randn(4 * 64 + 1)
    check([flat[1:].view(4, 64), torch.randn(65)[1:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5003, 96), (2050, 1024), (8193, 130), (31, 20_000)])
def test_same_bits_for_any_number_of_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        given = tensors(shape, dtype)
        results.append(oracle.outputs_and_gradients(function(lk.bias_act, "gelu"), given))
        results[-1]["without"] = lk.bias_act(given[0])
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for activation, shape in itertools.product(ACTIVATIONS, [(5, 77), (70, 1), (2, 2000)]):
        check(tensors(shape, dtype), activation)
    extremes = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 1e-7]).to(dtype)
    for activation in ACTIVATIONS:
        check([torch.linspace(-20, 20, 4001).to(dtype), None], activation)
        check_kinds([extremes, None], activation)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_that_are_streamed(dtype):
    cols = 1024 if dtype == torch.float32 else 2048  # a little more than 4 MiB
    x, bias = tensors((1031, cols), dtype)
    check([x, bias])
    check([x, None])


@pytest.mark.every_backend
def test_bias_gelu_is_torchs():
    x, bias = tensors()
    for approximate in ("none", "tanh"):
        expected = F.gelu(x + bias, approximate=approximate)
        torch.testing.assert_close(lk.bias_gelu(x, bias, approximate=approximate), expected)
    torch.testing.assert_close(lk.bias_gelu(x), F.gelu(x))


@pytest.mark.every_backend
def test_the_backward_gives_the_output_again(backend_of_test):
    for dtype, shape in itertools.product(DTYPES, [(70, 40), (1031, 2048)]):
        x, bias = tensors(shape, dtype)
        for given in (bias, None):
            again = torch.ops.lspm.bias_act_backward(
                x, x, given, 4, given is not None, True, False, backend_of_test
            )
            assert torch.equal(again[2], lk.bias_act(x, given))


ONES = torch.ones(2, 4)
NO_TENSOR = "x must be a floating-point tensor of one dimension or more, got"
BAD = {
    f"bias_act: {NO_TENSOR} list": lambda: lk.bias_act([1.0]),
    f"bias_act: {NO_TENSOR} () torch.float32": lambda: lk.bias_act(torch.ones(()), ONES[0]),
    f"bias_gelu: {NO_TENSOR} (2, 4) torch.int64": lambda: lk.bias_gelu(ONES.long()),
    "bias_act: bias must be a tensor of shape (4,), got (3,)": lambda: lk.bias_act(ONES, torch.ones(3)),
    "bias_act: bias must have dtype torch.float32, got torch.float16": lambda: lk.bias_act(
        ONES, torch.ones(4).half()
    ),
    "bias_act: bias must be on x's device cpu, got meta": lambda: lk.bias_act(
        ONES, torch.ones(4, device="meta")
    ),
    "bias_act: activation must be one of relu, silu, gelu, gelu_tanh, got 'gelu_new'": lambda: lk.bias_act(
        ONES, None, "gelu_new"
    ),
    "bias_gelu: approximate must be 'none' or 'tanh', got 'erf'": lambda: lk.bias_gelu(
        ONES, approximate="erf"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value) == message


def test_the_binding_refuses_what_would_touch_other_memory():
    x, bias = tensors()
    forward, backward = compiled.cpu.bias_act_forward, compiled.cpu.bias_act_backward
    for message, call in {
        "y must have another number of elements": lambda: forward(x, bias, x[:3], 4, 1),
        "bias must have another number of elements": lambda: forward(x, bias[:7], x, 4, 1),
        "x must be contiguous": lambda: forward(x.t(), None, x, 4, 1),
        "activation must be one that the contract names, got 2": lambda: forward(x, bias, x, 2, 1),
        "dbias must come with bias and partial": lambda: backward(x, x, bias, x, bias, None, None, 4, 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton"]
    with pytest.raises(NotImplementedError, match="bias_act: triton needs a tensor on cuda, got cpu"):
        lk.bias_act(ONES, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="bias_act: cpu needs dtype float32, bfloat16, float16"):
        lk.bias_act(ONES.double())
