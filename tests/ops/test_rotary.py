"""rotary: the public function, under every instruction set."""

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import rotary as ops
from lspm_kernels.reference import rotary as reference

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, T, D, R
SHAPES = {
    "one pair": (1, 1, 1, 2, 2),
    "decoding": (3, 8, 1, 64, 64),
    "dims of 64": (2, 3, 17, 64, 64),
    "dims of 128": (2, 2, 9, 128, 128),
    "dims passed through": (2, 3, 5, 80, 32),
    "odd dims": (2, 3, 5, 77, 74),
    "few of many dims": (1, 2, 3, 130, 6),
    "no batch": (0, 2, 5, 8, 8),
    "no heads": (2, 0, 5, 8, 4),
    "no rows": (2, 2, 0, 8, 8),
}
STYLES = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def tables(positions, rotated, dtype=F32):
    """cos and sin of angles at random, which show a mistaken position better than those of a model."""
    angles = torch.rand(positions, rotated // 2) * 7
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def bound(function, cos_sin, view=lambda x: x, **options):
    """function of x alone, its tables in float64 where x is."""

    def of_x(x):
        wide = [t.double() if x.dtype == torch.float64 else t for t in cos_sin]
        return function(view(x), *wide, **options)

    return of_x


def check(shape, dtype=F32, table_dtype=None, view=lambda x: x, ours=lk.rotary, **options):
    """Holds rotary to the oracle's rule, on positions that begin before those of the tables end."""
    B, H, T, D, R = shape
    cos_sin = tables(T + 9, R, table_dtype or dtype)
    forms = [bound(f, cos_sin, view, **options) for f in (ours, reference.rotary)]
    oracle.check(*forms, [torch.randn(B, H, T, D).to(dtype)])


@pytest.mark.every_backend
@STYLES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape, dtype, interleaved):
    check(SHAPES[shape], dtype, interleaved=interleaved)
    check(SHAPES[shape], dtype, F32, interleaved=interleaved)


@pytest.mark.every_backend
@STYLES
def test_against_complex_numbers(interleaved):
    x, angles = torch.randn(2, 3, 7, 16), torch.rand(7, 8) * 7
    pairs = x.unflatten(-1, (8, 2)) if interleaved else x.unflatten(-1, (2, 8)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(7, 8), angles)
    expected = torch.view_as_real(turned)
    expected = (expected if interleaved else expected.transpose(-1, -2)).flatten(-2)
    torch.testing.assert_close(lk.rotary(x, angles.cos(), angles.sin(), interleaved=interleaved), expected)


@STYLES
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, interleaved):
    for shape in ("one pair", "dims of 64", "dims passed through", "odd dims"):
        for table_dtype in (F32, dtype):
            check(SHAPES[shape], dtype, table_dtype, interleaved=interleaved, offsets=3)


@pytest.mark.every_backend
@pytest.mark.parametrize("offsets", [None, 0, 4, 9, [9, 0], [3, 5]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets(offsets, dtype):
    offsets = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    check(SHAPES["dims of 64"], dtype, offsets=offsets)
    check(SHAPES["no rows"], dtype, offsets=offsets)


@pytest.mark.every_backend
def test_offsets_are_positions():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(20, 8)
    whole = lk.rotary(x, cos, sin, offsets=torch.tensor([6, 11]))
    for sequence, offset in enumerate((6, 11)):
        for t in range(5):
            row = lk.rotary(x[sequence, None, :, t, None], cos, sin, offsets=offset + t)
            assert torch.equal(row[0, :, 0], whole[sequence, :, t])
    many = torch.stack((torch.tensor([6, 11]), torch.tensor([0, 0])), 1)[:, 0]  # not contiguous
    assert torch.equal(lk.rotary(x, cos, sin, offsets=many), whole)


VIEWS = {
    "heads inside": ((2, 7, 3, 64), lambda x: x.transpose(1, 2), False),
    "packed projection": ((2, 7, 3, 3, 64), lambda x: x.permute(2, 0, 3, 1, 4)[1], False),
    "rows apart": ((2, 3, 14, 64), lambda x: x[:, :, ::2], False),
    "expanded": ((2, 1, 7, 64), lambda x: x.expand(2, 3, 7, 64), False),
    "misaligned": ((2, 3, 7, 65), lambda x: x[..., 1:], False),
    "last dimension apart": ((2, 3, 7, 128), lambda x: x[..., ::2], True),
}


@pytest.mark.every_backend
@STYLES
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name, interleaved):
    size, view, copied = VIEWS[name]
    cos_sin = tables(9, 48)
    forms = [bound(f, cos_sin, view, interleaved=interleaved) for f in (lk.rotary, reference.rotary)]
    oracle.check(*forms, [torch.randn(size).bfloat16()])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        out = lk.rotary(view(torch.randn(size)), *cos_sin)
    assert out.transpose(1, 2).is_contiguous()
    assert ("aten::copy_" in {event.key for event in profile.events()}) == copied


@pytest.mark.every_backend
def test_tables_that_are_not_contiguous():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(10, 16)
    expected = reference.rotary(x, cos[::2, ::2], sin[::2, ::2])
    torch.testing.assert_close(lk.rotary(x, cos[::2, ::2], sin[::2, ::2]), expected)


@pytest.mark.every_backend
@STYLES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim, rotated",
    [
        (128, 72),
        *(pytest.param(*dims, marks=pytest.mark.long) for dims in ((128, 128), (128, 64), (132, 64))),
    ],
)
def test_large_outputs(dim, rotated, dtype, interleaved):
    check((1, 4, 4200, dim, rotated), dtype, F32, interleaved=interleaved)  # streamed where lines are whole


@STYLES
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, interleaved):
    x, cos_sin = torch.randn(3, 4, 301, 72).to(dtype), tables(301, 40)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        function = bound(lk.rotary, cos_sin, interleaved=interleaved)
        results.append(oracle.outputs_and_gradients(function, [x]))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.every_backend
@STYLES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30])
def test_special_values(value, interleaved):
    x, cos_sin = torch.randn(2, 3, 5, 48), tables(5, 38)
    x[1, 2, 3, 2] = x[1, 2, 3, 37] = x[0, 0, 0, 45] = value
    oracle.check(*[bound(f, cos_sin, interleaved=interleaved) for f in (lk.rotary, reference.rotary)], [x])


def bad(x=(2, 3, 5, 8), cos=(9, 4), sin=(9, 4), offsets=None):
    return *[torch.ones(t) if isinstance(t, tuple) else t for t in (x, cos, sin)], offsets


BAD = {
    "x must be a floating-point tensor (B, H, T, D), got list": bad(x=[1.0]),
    "x must be a floating-point tensor (B, H, T, D), got (2, 5, 8) torch.float32": bad(x=(2, 5, 8)),
    "x must be a floating-point tensor (B, H, T, D), got (2, 3, 5, 8) torch.int64": bad(bad()[0].long()),
    "cos must be a tensor (S, R / 2), got float": bad(cos=1.0),
    "cos must be a tensor (S, R / 2), got (1, 9, 4)": bad(cos=(1, 9, 4)),
    "cos must have 1 to D / 2 = 4 columns, got 5": bad(cos=(9, 5), sin=(9, 5)),
    "cos must have 1 to D / 2 = 4 columns, got 0": bad(cos=(9, 0), sin=(9, 0)),
    "cos must have a row for each of T = 5 positions, got 4": bad(cos=(4, 4), sin=(4, 4)),
    "cos must have dtype torch.float32, got torch.float16": bad(cos=torch.ones(9, 4).half()),
    "cos must have dtype torch.bfloat16 or torch.float32, got torch.float16": bad(
        bad()[0].bfloat16(), torch.ones(9, 4).half(), torch.ones(9, 4).half()
    ),
    "cos must be on x's device cpu, got meta": bad(cos=torch.ones(9, 4, device="meta")),
    "cos must be without a gradient, got requires_grad=True": bad(cos=torch.ones(9, 4, requires_grad=True)),
    "sin must be a tensor of cos's shape (9, 4), got (9, 3)": bad(sin=(9, 3)),
    "sin must be a tensor of cos's shape (9, 4), got NoneType": bad(sin=None),
    "sin must have cos's dtype torch.float32, got torch.float16": bad(sin=torch.ones(9, 4).half()),
    "offsets must be None, an int or a tensor, got float": bad(offsets=1.0),
    "offsets must be None, an int or a tensor, got bool": bad(offsets=True),
    "offsets must have dtype torch.int64, got torch.int32": bad(offsets=torch.ones(2, dtype=torch.int32)),
    "offsets must have the shape (B,) = (2,), got (3,)": bad(offsets=torch.tensor([0, 0, 0])),
    "offsets must have the shape (B,) = (2,), got ()": bad(offsets=torch.tensor(0)),
    "offsets must be on x's device cpu, got meta": bad(offsets=torch.tensor([0, 0], device="meta")),
    "offsets must lie in 0 to S - T = 4, got -1": bad(offsets=-1),
    "offsets must lie in 0 to S - T = 4, got 5": bad(offsets=5),
    "offsets must lie in 0 to S - T = 4, got -3": bad(offsets=torch.tensor([0, -3])),
    "offsets must lie in 0 to S - T = 4, got 6": bad(offsets=torch.tensor([6, 0])),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    *given, offsets = BAD[message]
    with pytest.raises(ValueError) as error:
        lk.rotary(*given, offsets=offsets, backend=backend)
    assert str(error.value) == f"rotary: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    x, cos, sin, _ = bad()
    out = torch.empty(2, 5, 3, 8)
    for message, wrong in {
        "out must have another number of elements": (x, cos, sin, None, out[:1], 0),
        "sin must have another number of elements": (x, cos, sin[:3], None, out, 0),
        "cos must have rows of at most half of x's": (x, torch.ones(9, 5), sin, None, out, 0),
        "x must have a contiguous last dimension": (torch.ones(2, 3, 8, 5).mT, cos, sin, None, out, 0),
        "x must have 4 dimensions": (x[0], cos, sin, None, out, 0),
        "offsets must have another number": (x, cos, sin, torch.zeros(3, dtype=torch.int64), out, 0),
        "rotary: offsets must lie in 0 to S - T = 4, got 5": (x, cos, sin, None, out, 5),
    }.items():
        for kernel in (compiled.cpu.rotary_forward, compiled.cpu.rotary_backward):
            with pytest.raises(ValueError, match=message):
                kernel(*wrong, False, 1)


def test_only_the_rows_of_the_table_run():
    given = bad()[:3]
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="rotary: triton needs a tensor on cuda, got cpu"):
        lk.rotary(*given, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="rotary: cpu needs dtype float32, bfloat16, float16, got "):
        lk.rotary(*[t.double() for t in given])
