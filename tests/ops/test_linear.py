"""linear: few rows by weights in floating point or in integers, under every instruction set."""

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import linear as ops
from lspm_kernels.reference import linear as reference

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 4, 5, ops.MOST_ROWS]
SIZES = [(1, 1), (3, 33), (16, 64), (50, 97), (130, 768), (17, 4099)]  # outputs and inputs


def of(weight, scales=None, backend=None):
    return lambda x, bias: lk.linear(x, weight, bias, scales=scales, backend=backend)


def check(x, weight, bias, scales=None):
    truth = [
        reference.linear(t[0], weight, t[1], scales)
        for t in ((x.double(), None if bias is None else bias.double()), (x, bias))
    ]
    oracle.compare("y", lk.linear(x, weight, bias, scales=scales), *truth)


def integers(outputs, inputs, groups):
    return torch.randint(-127, 128, (outputs, inputs)).to(torch.int8), torch.rand(outputs, groups) / 64


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_against_the_reference(outputs, inputs, dtype):
    weight = torch.randn(outputs, inputs).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        check(x, weight, torch.randn(outputs).to(dtype if rows % 2 else F32))
        check(x, weight, None)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs", "groups"), [(3, 33, 1), (50, 768, 1), (50, 768, 24), (17, 384, 3), (33, 96, 1)]
)
def test_integers(outputs, inputs, groups, dtype):
    weight, scales = integers(outputs, inputs, groups)
    for rows in ROWS:
        check(torch.randn(rows, inputs).to(dtype), weight, torch.randn(outputs), scales)


@pytest.mark.every_backend
def test_a_prompt_by_a_weight_of_another_dtype():
    for rows in (9, 64, 70, 130):
        for dtype, other in ((F32, BF16), (BF16, F32), (F32, F16)):
            check(torch.randn(rows, 97).to(dtype), torch.randn(33, 130).to(other)[:, 7:104], torch.randn(33))
        for groups in (1, 3):
            weight, scales = integers(33, 96, groups)
            check(torch.randn(rows, 96), weight, torch.randn(33), scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for rows in (1, 3, 6):
        x, bias = torch.randn(rows, 224).to(dtype), torch.randn(45).to(dtype)
        for other in DTYPES:
            check(x, torch.randn(45, 224).to(other), bias)
            check(x[:, :77], torch.randn(45, 77).to(other), bias)
        for groups in (1, 7):
            weight, scales = integers(45, 224, groups)
            check(x, weight, bias, scales)


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30])
def test_special_values(value):
    x, weight = torch.randn(2, 70), torch.randn(20, 70)
    x[1, 69] = weight[3, 5] = value
    check(x, weight, None)


@pytest.mark.every_backend
def test_no_elements():
    for rows, outputs, inputs in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        assert torch.equal(lk.linear(x, weight, bias), F.linear(x, weight, bias))
        small, scales = lk.quantize_int8(weight, None if inputs else 32)
        check(x, small, bias, scales)


@pytest.mark.every_backend
def test_any_shape_and_strides():
    weight, bias = torch.randn(30, 80), torch.randn(60)
    x = torch.randn(2, 3, 80)
    y = lk.linear(x, weight, bias[::2])
    assert y.shape == (2, 3, 30)
    flat = lk.linear(x.reshape(6, 80), weight, bias[::2].contiguous())
    assert torch.equal(y.reshape(6, 30), flat)
    assert torch.equal(lk.linear(x[0, 0], weight), lk.linear(x[0, :1], weight)[0])
    wide = torch.randn(30, 200)
    assert torch.equal(lk.linear(x, wide[:, 7:87]), lk.linear(x, wide[:, 7:87].contiguous()))
    columns = torch.randn(80, 30)
    assert torch.equal(lk.linear(x, columns.T), lk.linear(x, columns.T.contiguous()))
    assert torch.equal(lk.linear(x.transpose(0, 1), weight), lk.linear(x, weight).transpose(0, 1))


def test_same_bits_for_any_number_of_threads():
    for weight, scales in ((torch.randn(999, 768).bfloat16(), None), integers(999, 768, 24)):
        for rows in (ops.MOST_ROWS, 100):
            x, results = torch.randn(rows, 768), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(lk.linear(x, weight, scales=scales))
            assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_bits_for_any_number_of_few_rows():
    x = torch.randn(ops.MOST_ROWS, 768)
    for weight, scales in ((torch.randn(999, 768), None), integers(999, 768, 24)):
        alone = torch.cat([lk.linear(row[None], weight, scales=scales) for row in x])
        assert torch.equal(lk.linear(x, weight, scales=scales), alone)


def test_more_rows_and_gradients_are_torchs():
    x, bias = torch.randn(ops.MOST_ROWS + 1, 64), torch.randn(20)
    weight = torch.randn(20, 64)
    assert torch.equal(lk.linear(x, weight, bias), F.linear(x, weight, bias))
    small, scales = integers(20, 64, 2)
    many = torch.randn(ops.MOST_ROWS_OF_OTHERS + 1, 64)
    plain = F.linear(many, reference.dequantized(small, scales, F32), bias)
    assert torch.equal(lk.linear(many, small, bias, scales=scales), plain)
    leaves = [t.clone().requires_grad_() for t in (x[:2], weight, bias)]
    expected = [t.clone().requires_grad_() for t in (x[:2], weight, bias)]
    lk.linear(*leaves).square().sum().backward()
    F.linear(*expected).square().sum().backward()
    for ours, theirs in zip(leaves, expected, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    alone = bias.clone().requires_grad_()  # as where biases alone are tuned
    lk.linear(x[:2], weight, alone).sum().backward()
    assert torch.equal(alone.grad, torch.full((20,), 2.0))
    one = x[:1].clone().requires_grad_()
    lk.linear(one, small, scales=scales).sum().backward()
    assert torch.allclose(one.grad[0], reference.dequantized(small, scales, F32).sum(0))


def test_compile_and_opcheck():
    weight, bias = torch.randn(20, 64), torch.randn(20)
    small, scales = integers(20, 64, 2)
    compiled_linear = torch.compile(
        lambda x: lk.linear(x, weight, bias) + lk.linear(x, small, scales=scales), fullgraph=True
    )
    x = torch.randn(3, 64)
    assert torch.equal(compiled_linear(x), lk.linear(x, weight, bias) + lk.linear(x, small, scales=scales))
    torch.library.opcheck(torch.ops.lspm.linear.default, (x, weight, bias, None, "cpu"))
    torch.library.opcheck(torch.ops.lspm.linear.default, (x, small, None, scales, "cpu"))


def test_meta_tensors():
    assert lk.linear(X.to("meta"), W.to("meta")).shape == (2, 5)
    assert lk.WeightOnlyLinear(W).to("meta")(X.to("meta")).shape == (2, 5)


def test_autocast():
    x, weight, bias = torch.randn(2, 64), torch.randn(20, 64), torch.randn(20)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.linear(x, weight, bias)
    assert y.dtype == BF16 and torch.equal(y, lk.linear(x.to(BF16), weight, bias))


@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_quantize_int8(group_size):
    weight = torch.randn(40, 128)
    weight[3] = 0
    small, scales = lk.quantize_int8(weight, group_size)
    assert small.dtype == torch.int8 and scales.shape == (40, 128 // (group_size or 128))
    assert small.abs().max() == 127 and not small[3].any() and scales[3].eq(1).all()
    error = (reference.dequantized(small, scales, F32) - weight).view(40, scales.shape[1], -1).abs()
    assert (error.amax(2) <= scales * 0.5001).all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
@pytest.mark.parametrize("group_size", [None, 32])
def test_quantize_int8_of_nothing(shape, group_size):
    small, scales = lk.quantize_int8(torch.zeros(shape), group_size)
    groups = shape[1] // (group_size or shape[1]) if shape[1] else 1
    assert small.shape == shape and small.dtype == torch.int8 and scales.shape == (shape[0], groups)


@pytest.mark.parametrize("dtype", [F32, torch.int8], ids=str)
def test_without_inputs_the_bias_is_left(dtype):
    scales = torch.ones(3, 1) if dtype == torch.int8 else None
    x, weight, bias = torch.zeros(2, 0), torch.zeros(3, 0, dtype=dtype), torch.randn(3)
    assert torch.equal(lk.linear(x, weight, bias, scales=scales, backend="cpu"), bias.expand(2, 3))


X, W = torch.zeros(2, 64), torch.zeros(5, 64)
I8, S = torch.zeros(5, 64, dtype=torch.int8), torch.ones(5, 2)
FLOATS = "torch.float32, torch.bfloat16, torch.float16"
ERRORS = {
    "linear: x must be a floating-point tensor of one dimension or more, got (2,) torch.int64": (
        lambda: lk.linear(torch.zeros(2, dtype=torch.int64), W)
    ),
    "linear: weight must be of shape (N, 64), got (5, 63)": lambda: lk.linear(X, W[:, 1:]),
    f"linear: weight must have dtype one of {FLOATS}, torch.int8, got torch.int64": (
        lambda: lk.linear(X, W.long())
    ),
    "linear: bias must be a tensor of shape (5,), got (4,)": lambda: lk.linear(X, W, torch.zeros(4)),
    "linear: bias must have dtype torch.float32, got torch.float16": (
        lambda: lk.linear(X, W, torch.zeros(5, dtype=F16))
    ),
    "linear: scales must be there exactly where weight is int8, got torch.int8 and none": (
        lambda: lk.linear(X, I8)
    ),
    "linear: scales must be there exactly where weight is int8, got torch.float32 and (5, 2)": (
        lambda: lk.linear(X, W, scales=S)
    ),
    "linear: scales must be of shape (5, G), got (5,)": lambda: lk.linear(X, I8, scales=S[:, 0]),
    "linear: scales must have dtype torch.float32, got torch.float64": (
        lambda: lk.linear(X, I8, scales=S.double())
    ),
    "linear: scales must be of groups of a multiple of 32 of the 64 columns, got 4 groups": (
        lambda: lk.linear(X, I8, scales=torch.ones(5, 4))
    ),
    "linear: weight must be on x's device cpu, got meta": lambda: lk.linear(X, W.to("meta")),
    "quantize_int8: group_size must be a multiple of 32 that divides weight's 64 columns, got 48": (
        lambda: lk.quantize_int8(W, 48)
    ),
    "quantize_int8: weight must be finite, got nan": lambda: lk.quantize_int8(W + float("nan")),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as error:
        ERRORS[message]()
    assert str(error.value) == message


def test_refusals():
    with pytest.raises(NotImplementedError, match=r"at most 8 rows, on a CPU 512 .*, got 9"):
        lk.linear(torch.zeros(9, 64), W, backend="cpu")
    with pytest.raises(NotImplementedError, match="linear: cpu needs tensors without a gradient"):
        lk.linear(X, W.clone().requires_grad_(), backend="cpu")
