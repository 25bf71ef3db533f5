"""max_pool2d: the public function, under every instruction set, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import max_pool2d as ops

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last
# shape of x, then kernel_size, stride, padding, dilation, ceil_mode
CASES = {
    "one element": ((1, 1, 1, 1), 1, None, 0, 1, False),
    "the stem of a ResNet": ((2, 64, 13, 12), 3, 2, 1, 1, False),
    "windows apart": ((2, 17, 9, 8), 2, 3, 0, 1, False),
    "windows that overlap": ((1, 70, 7, 9), (3, 2), 1, (1, 0), 1, False),
    "dilated": ((2, 5, 11, 12), (3, 2), (2, 1), (1, 1), (2, 3), False),
    "a last window past the padding": ((2, 33, 8, 7), 3, 2, 1, 1, True),
    "a last window left out": ((1, 3, 5, 6), (3, 2), 3, (1, 0), 1, True),
    "more taps than a byte counts": ((1, 18, 20, 19), (17, 16), 2, (8, 0), 1, False),
    "three dimensions": ((9, 8, 7), 3, 2, 1, 1, False),
    "no images": ((0, 3, 8, 8), 2, None, 0, 1, False),
}


def pools(case):
    """Our function and torch's, of x alone, with and without indices."""
    _, kernel, stride, padding, dilation, ceil_mode = CASES[case]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    return [
        [lambda x, f=f, i=i: f(x, kernel, **options, return_indices=i) for f in (lk.max_pool2d, F.max_pool2d)]
        for i in (False, True)
    ]


def image(case, dtype=F32, values=None):
    """Normal numbers or, with `values`, so few different ones that windows hold many equal ones."""
    shape = CASES[case][0]
    return (torch.randn(shape) if values is None else torch.randint(values, shape)).to(dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_torch(case, dtype):
    (ours, theirs), (with_indices, torchs) = pools(case)
    oracle.check(ours, theirs, [image(case, dtype)])
    for x in (image(case, dtype), image(case, dtype, values=2)):
        for found, expected in zip(with_indices(x), torchs(x), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert torch.equal(ours(x), theirs(x))  # where no positions are kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for case in ("the stem of a ResNet", "windows that overlap", "more taps than a byte counts"):
        (ours, theirs), (with_indices, torchs) = pools(case)
        oracle.check(ours, theirs, [image(case, dtype)])
        x = image(case, dtype, values=3)
        assert torch.equal(with_indices(x)[1], torchs(x)[1])


@pytest.mark.every_backend
@pytest.mark.parametrize("case", ["the stem of a ResNet", "dilated"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(value, case):
    (_, _), (ours, theirs) = pools(case)
    for share in (0.1, 1.0):
        x = image(case)
        x[torch.rand(x.shape) <= share] = value
        for found, expected in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_number_comes_out_as_it_went_in(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype) if dtype != F32 else bits.to(torch.int32).mul(2**16 + 1).view(F32)
    x = x[x.isfinite()].reshape(1, -1, 1, 1)  # subnormals too
    found, given = (t.flatten().view(torch.uint8) for t in (lk.max_pool2d(x, 1), x))
    assert torch.equal(found, given)


@pytest.mark.every_backend
def test_a_window_all_of_whose_taps_lie_outside():
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    ours, theirs = (f(x, 2, 1, 1, 3, return_indices=True) for f in (lk.max_pool2d, F.max_pool2d))
    assert all(map(torch.equal, ours, theirs))
    # torch's backward writes past the end of dx here.
    assert not torch.autograd.grad(ours[0].sum(), x)[0].any()


@pytest.mark.every_backend
def test_of_gradients_only_those_of_windows_that_took_an_element_reach_it():
    x = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]], requires_grad=True)
    y = lk.max_pool2d(x, (1, 2), 1)
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[[1.0, 10.0, 100.0]]]))
    assert dx.tolist() == [[[0.0, 11.0, 100.0, 0.0]]]
    (dx,) = torch.autograd.grad(lk.max_pool2d(x, (1, 2), 1), x, torch.full((1, 1, 3), float("inf")))
    assert dx.tolist() == [[[0.0, float("inf"), float("inf"), 0.0]]]


def test_memory_is_channels_last():
    x = torch.randn(2, 5, 8, 8).to(memory_format=LAST).requires_grad_()
    y, indices = lk.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert y.is_contiguous(memory_format=LAST) and indices.is_contiguous(memory_format=LAST)
    assert not indices.requires_grad
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.is_contiguous(memory_format=LAST)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        lk.max_pool2d(x, 3, 2, 1)
    assert "aten::copy_" not in {event.key for event in profile.events()}
    for given in (x.detach().contiguous(), x.detach().permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(lk.max_pool2d(given, 3, 2, 1), y)


def test_what_is_kept_for_the_backward_is_a_byte_for_an_element():
    for kernel, dtype in ((16, torch.uint8), (17, torch.int32)):
        x = torch.randn(1, 2, 20, 20, requires_grad=True)
        (kept,) = lk.max_pool2d(x, kernel).grad_fn.saved_tensors
        assert kept.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    x = torch.randn(3, 65, 31, 30).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(oracle.outputs_and_gradients(lambda x: lk.max_pool2d(x, 3, 2, 1), [x]))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


X = torch.ones(2, 3, 8, 8)
SHAPES = "x must be a floating-point tensor (N, C, H, W) or (C, H, W), where only N may be 0"
NUMBERS = "must be an integer of at least"
BAD = {
    f"{SHAPES}, got list": ([1.0], 2),
    f"{SHAPES}, got (8, 8) torch.float32": (X[0, 0], 2),
    f"{SHAPES}, got (2, 3, 8, 8) torch.int64": (X.long(), 2),
    f"{SHAPES}, got (2, 0, 8, 8) torch.float32": (X[:, :0], 2),
    f"kernel_size {NUMBERS} 1, or two, got 0": (X, 0),
    f"kernel_size {NUMBERS} 1, or two, got 2.0": (X, 2.0),
    f"kernel_size {NUMBERS} 1, or two, got (2, 2, 2)": (X, (2, 2, 2)),
    f"stride {NUMBERS} 1, or two, got 0": (X, 2, 0),
    f"padding {NUMBERS} 0, or two, got -1": (X, 2, 1, -1),
    f"dilation {NUMBERS} 1, or two, got (1, 0)": (X, 2, 1, 0, (1, 0)),
    "padding must be at most half of kernel_size (3, 3), got (2, 2)": (X, 3, 1, 2),
    "kernel_size must fit into x with its padding, got (9, 1) with dilation (1, 1) for (2, 3, 8, 8)": (
        X,
        (9, 1),
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    with pytest.raises(ValueError) as error:
        lk.max_pool2d(*BAD[message], backend=backend)
    assert str(error.value) == f"max_pool2d: {message}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_flag_may_be_anything_that_is_true_or_false(backend):
    assert lk.max_pool2d(X, 3, 2, ceil_mode=1, return_indices=0, backend=backend).shape == (2, 3, 4, 4)


def test_the_binding_refuses_what_would_touch_other_memory():
    x, y, bytes_ = torch.ones(2, 8, 8, 3), torch.empty(2, 4, 4, 3), torch.empty(2, 4, 4, 3, dtype=torch.uint8)
    window = [2, 2, 2, 2, 0, 0, 1, 1]
    for message, wrong in {
        "y must have 4 dimensions": (x, y[0], bytes_, window),
        "y must have x's images": (x, y[:1], bytes_, window),
        "x must be contiguous": (x.transpose(1, 2), y, bytes_, window),
        "positions must have another number": (x, y, bytes_[:1], window),
        "positions must have the dtype": (x, y, bytes_.int(), window),
        "window must be of positive sizes": (x, y, bytes_, [2, 2, 0, 2, 0, 0, 1, 1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            compiled.cpu.max_pool2d_forward(*wrong, 1)
    with pytest.raises(ValueError, match="dy must have the dtype"):
        compiled.cpu.max_pool2d_backward(y.half(), bytes_, x, window, 1)


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="max_pool2d: triton needs a tensor on cuda, got cpu"):
        lk.max_pool2d(X, 2, backend="triton")
    with pytest.warns(
        lk.FallbackWarning, match="max_pool2d: cpu needs dtype float32, bfloat16, float16, got "
    ):
        lk.max_pool2d(X.double(), 2)
