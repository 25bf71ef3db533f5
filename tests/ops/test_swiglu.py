"""swiglu and geglu; what torch.compile and others make of them stands in test_mlp_operators.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import swiglu as ops
from lspm_kernels.reference import swiglu as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 1), (6, 40), (2, 3, 37), (300, 257), (33, 768), (7,), (3, 20_000)]
# Ours and the reference's activation.
FORMS = {
    "swiglu": (lk.swiglu, "silu"),
    "geglu": (lk.geglu, "gelu"),
    "geglu_tanh": (lambda *t: lk.geglu(*t, approximate="tanh"), "gelu_tanh"),
}
EACH = pytest.mark.parametrize("form", FORMS)


def check(form, inputs, laid=lambda *t: t, **options):
    """laid(*inputs) -> gate, up, within what is differentiated."""
    ours, activation = FORMS[form]
    oracle.check(
        lambda *t: ours(*laid(*t)),
        lambda *t: reference.swiglu(*_both(*laid(*t)), activation),
        inputs,
        **options,
    )


def _both(gate, up=None):
    return gate, up


def tensors(shape=(6, 40), dtype=torch.float32):
    return list(torch.randn(2, *shape).mul(2).to(dtype).unbind())


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@EACH
def test_against_the_reference(form, shape, dtype):
    check(form, tensors(shape, dtype))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (5, 6), (2, 3, 74), (300, 514), (33, 1536)])
@EACH
def test_one_packed_tensor(form, shape, dtype):
    check(form, [torch.randn(shape).mul(2).to(dtype)])


# How gate and up may lie, as functions of a tensor (3, 5, 80), and whether they are read there.
LAYOUTS = {
    "halves": (lambda t: t.chunk(2, -1), True),
    "halves in odd places": (lambda t: (t[..., 3:40], t[..., 41:78]), True),
    "parts of rows apart": (lambda t: (t[:, ::2, :9], t[:, ::2, 9:18]), False),
    "rows in another order": (lambda t: (t.transpose(0, 1)[..., :40], t.transpose(0, 1)[..., 40:]), False),
    "columns apart": (lambda t: (t[..., ::2], t[..., 1::2]), False),
    "one row for all": (lambda t: (t[:1, :1, :40].expand(3, 5, 40), t[..., 40:]), True),
    "one row": (lambda t: (t[0, 2, :40], t[1, 0, 40:]), True),
}


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    check("swiglu", [torch.randn(3, 5, 80).to(dtype)], laid=LAYOUTS[layout][0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_where_it_lies(layout):
    views, in_place = LAYOUTS[layout]
    t = torch.randn(3, 5, 80)
    for view in views(t):
        at = ops._rows(view).untyped_storage().data_ptr()
        assert (at == t.untyped_storage().data_ptr()) == in_place


@pytest.mark.every_backend
def test_packed_in_a_layout_of_its_own():
    check("swiglu", [torch.randn(6, 100)], laid=lambda t: (t[:, 10:90],))
    check("swiglu", [torch.randn(80, 6)], laid=lambda t: (t.t(),))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_over_the_whole_range(form, dtype):
    gate = torch.cat((torch.linspace(-20, 20, 4001), torch.linspace(-1, 1, 201) * 1e-3)).to(dtype)
    check(form, [gate, torch.randn(4202).to(dtype)])


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_what_is_not_finite(form, dtype):
    gate, up = tensors((3, 40), dtype)
    gate[0, 5], gate[1, 7], gate[2, 9], gate[2, 33] = float("nan"), float("inf"), -float("inf"), 0.0
    up[0, 1], up[0, 2], up[2, 33] = float("nan"), float("inf"), float("inf")
    ours, activation = FORMS[form]
    actual = oracle.outputs_and_gradients(ours, [gate, up])
    wide = [gate.double(), up.double()]
    truth = oracle.outputs_and_gradients(lambda *t: reference.swiglu(*t, activation), wide)
    for name, t in truth.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual[name]), kind(t)), (name, kind)


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 4)])
def test_empty(shape):
    check("swiglu", tensors(shape))
    check("swiglu", tensors(shape)[:1])


@pytest.mark.every_backend
def test_a_gradient_for_one_input_alone():
    gate, up = tensors()
    for wanted in (gate, up):
        wanted.requires_grad_()
        ours = torch.autograd.grad(lk.swiglu(gate, up).pow(2).sum(), wanted)[0]
        theirs = torch.autograd.grad(reference.swiglu(gate, up).pow(2).sum(), wanted)[0]
        torch.testing.assert_close(ours, theirs)
        wanted.requires_grad_(False)


@pytest.mark.every_backend
def test_two_dtypes_are_promoted_as_a_product_is():
    gate, up = tensors()
    for pair in ((gate.bfloat16(), up), (gate, up.half()), (gate.bfloat16(), up.half())):
        assert lk.swiglu(*pair).dtype == (F.silu(pair[0]) * pair[1]).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        gate, up = tensors((1003, 258), dtype)
        results.append(oracle.outputs_and_gradients(lk.swiglu, [gate, up]))
        results[-1]["packed"] = lk.swiglu(torch.cat((gate, up), -1))
    assert torch.equal(results[0]["packed"], results[0]["output 0"])
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for form, shape in itertools.product(FORMS, [(5, 77), (70, 1), (2, 2000)]):
        check(form, tensors(shape, dtype))
    check("swiglu", [torch.linspace(-120, 120, 4002).to(dtype)])


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_that_are_streamed(dtype, backend_of_test):
    cols = 1024 if dtype == torch.float32 else 2048  # a little more than 4 MiB
    gate, up = tensors((1031, cols), dtype)
    check("swiglu", [gate, up])
    packed = torch.cat((gate, up), -1)
    check("swiglu", [packed])
    again = torch.ops.lspm.swiglu_backward(gate, packed, None, 3, True, False, backend_of_test)[2]
    assert torch.equal(again, lk.swiglu(gate, up))


UP = "up must be a floating-point tensor of gate's shape (2, 4), got"
ONES = torch.ones(2, 4)
NO_TENSOR = "gate must be a floating-point tensor of one dimension or more, got"
BAD = {
    f"swiglu: {NO_TENSOR} list": lambda: lk.swiglu([1.0], ONES),
    f"geglu: {NO_TENSOR} () torch.float32": lambda: lk.geglu(torch.ones(())),
    "swiglu: gate must have an even last dimension where up is None, got 3": lambda: lk.swiglu(ONES[:, :3]),
    f"swiglu: {UP} (4,) torch.float32": lambda: lk.swiglu(ONES, ONES[0]),
    f"swiglu: {UP} (2, 4) torch.complex64": lambda: lk.swiglu(ONES, ONES.to(torch.complex64)),
    f"geglu: {UP} float": lambda: lk.geglu(ONES, 1.0),
    "swiglu: up must be on gate's device cpu, got meta": lambda: lk.swiglu(ONES, ONES.to("meta")),
    "geglu: approximate must be 'none' or 'tanh', got 'erf'": lambda: lk.geglu(ONES, ONES, approximate="erf"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value) == message


def test_the_binding_refuses_what_would_touch_other_memory():
    gate, up = tensors()
    y, forward, backward = torch.empty_like(gate), compiled.cpu.swiglu_forward, compiled.cpu.swiglu_backward
    rows = torch.randn(3, 4, 40)
    for message, call in {
        "y must have another number of elements": lambda: forward(gate, up, y[:3], 3, 1),
        "up must have another number of elements": lambda: forward(gate, up[:3], y, 3, 1),
        "gate must have a contiguous last dimension": lambda: forward(gate.t(), None, y[:2], 3, 1),
        "gate must have rows that lie equally far apart": lambda: forward(rows[:, :2], rows[:, :2], y, 3, 1),
        "gate must have another number of columns": lambda: forward(gate[:, :7], None, y, 3, 1),
        "activation must be one that the contract names, got 1": lambda: forward(gate, up, y, 1, 1),
        "dup must be there exactly where up is": lambda: backward(y, gate, up, y, None, None, 3, 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton"]
    with pytest.raises(NotImplementedError, match="swiglu: triton needs a tensor on cuda, got cpu"):
        lk.swiglu(ONES, ONES, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="geglu: cpu needs dtype float32, bfloat16, float16"):
        lk.geglu(ONES.double(), ONES.double())
