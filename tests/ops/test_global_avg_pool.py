"""global_avg_pool: the public function, under every instruction set."""

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import global_avg_pool as ops
from lspm_kernels.reference import global_avg_pool as reference

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last
SHAPES = [(1, 1, 1, 1), (2, 3, 4, 5), (2, 70, 7, 7), (3, 17, 9, 30), (2, 1030, 3, 3), (1, 2048, 7, 7)]
EMPTY = [(0, 3, 2, 2), (2, 0, 3, 3), (2, 3, 0, 4)]


def check(x):
    oracle.check(lk.global_avg_pool, reference.global_avg_pool, [x])


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_against_the_reference(shape, dtype):
    check(torch.randn(shape).to(dtype))
    check((torch.randn(shape) + 3).to(dtype).to(memory_format=LAST))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for shape in SHAPES[1:5]:
        check((torch.randn(shape) + 3).to(dtype))


@pytest.mark.every_backend
def test_a_sum_of_many_pixels_rounds_little():
    check(torch.rand(1, 5, 300, 301) + 1)


def test_a_gradient_that_is_streamed():
    for dtype, channels in ((F32, 512), (BF16, 512), (F16, 64)):
        check(torch.randn(2, channels, 33, 65).to(dtype))  # more than 4 MiB, but for F16


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30])
def test_special_values(value):
    x = torch.randn(2, 19, 3, 5)
    x[1, 2, 0, 3] = x[0, 17, 2, 4] = value
    oracle.check(lk.global_avg_pool, reference.global_avg_pool, [x], gradients=False)


def test_memory():
    x = torch.randn(2, 5, 8, 8).to(memory_format=LAST).requires_grad_()
    y = lk.global_avg_pool(x)
    assert y.shape == (2, 5, 1, 1) and y.is_contiguous()
    assert torch.autograd.grad(y.sum(), x)[0].is_contiguous(memory_format=LAST)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        lk.global_avg_pool(x)
    assert "aten::copy_" not in {event.key for event in profile.events()}
    assert torch.equal(lk.global_avg_pool(x.detach().contiguous()), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    x = torch.randn(3, 1100, 7, 9).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(oracle.outputs_and_gradients(lk.global_avg_pool, [x]))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


BAD = {
    "got list": [1.0],
    "got (3, 8, 8) torch.float32": torch.ones(3, 8, 8),
    "got (2, 3, 8, 8) torch.int64": torch.ones(2, 3, 8, 8, dtype=torch.int64),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    with pytest.raises(ValueError) as error:
        lk.global_avg_pool(BAD[message], backend=backend)
    assert str(error.value) == (f"global_avg_pool: x must be a floating-point tensor (N, C, H, W), {message}")


def test_the_binding_refuses_what_would_touch_other_memory():
    x, y = torch.ones(2, 8, 8, 3), torch.empty(2, 3)
    for kernel, name in (("forward", "x"), ("backward", "dx")):
        first, last = (x, y) if kernel == "forward" else (y, x)
        call = getattr(compiled.cpu, f"global_avg_pool_{kernel}")
        call(first, last, 1)
        for message, wrong in {
            f"{name} must have 4 dimensions": (x[0], y),
            f"{name} must be contiguous": (x.transpose(1, 2), y),
            f"{'y' if name == 'x' else 'dy'} must have another number of elements": (x, y[:1]),
        }.items():
            with pytest.raises(ValueError, match=message):
                call(*(wrong if kernel == "forward" else wrong[::-1]), 1)


def test_only_the_rows_of_the_table_run():
    x = torch.ones(2, 3, 8, 8)
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="global_avg_pool: triton needs a tensor on cuda, got cpu"):
        lk.global_avg_pool(x, backend="triton")
    with pytest.warns(
        lk.FallbackWarning, match="global_avg_pool: cpu needs dtype float32, bfloat16, float16"
    ):
        lk.global_avg_pool(x.double())
