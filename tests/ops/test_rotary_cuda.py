"""The CUDA kernel of rotary, executed on the CPU (tests/cuda_on_cpu) against the float64 reference."""

import ctypes

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops.test_rotary import BF16, F16, F32, STYLES, bound, tables

import oracle
from lspm_kernels.reference import rotary as reference

DTYPES = {F32: 0, BF16: 1, F16: 2}

library = fixture(build.ROOT / "csrc/cuda/rotary.cu", build.HERE / "entries/rotary.cpp")


class Rotary(torch.autograd.Function):
    """The kernel as a differentiable function of x, which lies in device memory with x's own strides."""

    @staticmethod
    def forward(ctx, x, library, misaligned, *rest):
        ctx.rest = library, misaligned, *rest
        return launched(x, *ctx.rest, inverse=False)

    @staticmethod
    def backward(ctx, dout):
        return launched(dout, *ctx.rest, inverse=True), *[None] * 7


def launched(x, library, misaligned, cos, sin, offsets, offset, interleaved, inverse, where=(0, None)):
    B, H, T, D = x.shape
    out = library.empty((B, T, H, D), x.dtype, "out" in misaligned)
    tensors = {"x": flat(x), "cos": cos, "sin": sin, "offsets": offsets}
    inputs = [library.copy(t, name in misaligned) for name, t in tensors.items()]
    sizes = B, H, T, D, cos.shape[1], cos.shape[0], *x.stride()[:3], offset
    shape = shape_of(library, sizes, DTYPES[x.dtype], DTYPES[cos.dtype], interleaved, inverse)
    library.call("rotary", *inputs, out, shape, *where)
    return out.tensor().transpose(1, 2)


def flat(x):
    """The memory that x covers, gaps included."""
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach if x.numel() else 0,), (1,))


def shape_of(library, sizes, dtype, table_dtype, interleaved, inverse):
    library.c.rotary_shape.restype = ctypes.c_void_p
    sizes = (ctypes.c_int64 * 10)(*sizes)
    flags = dtype, table_dtype, int(interleaved), int(inverse)
    return ctypes.c_void_p(library.c.rotary_shape(sizes, *flags))


def on(library, misaligned=()):
    """rotary on the emulator."""

    def rotary(x, cos, sin, *, offsets=None, interleaved=False):
        many = isinstance(offsets, torch.Tensor)
        start = (offsets, 0) if many else (None, offsets or 0)
        return Rotary.apply(x, library, misaligned, cos, sin, *start, interleaved)

    return rotary


def check(library, shape, dtype=F32, table_dtype=F32, view=lambda x: x, misaligned=(), **options):
    *size, rotated = shape
    x = torch.randn(size).to(dtype)
    cos_sin = tables(view(x).shape[2] + 9, rotated, table_dtype)
    forms = (on(library, misaligned), reference.rotary)
    oracle.check(*[bound(f, cos_sin, view, **options) for f in forms], [x])


# B, H, T, D, R
SHAPES = [(1, 1, 1, 2, 2), (2, 6, 5, 64, 64), (2, 3, 4, 80, 32), (1, 5, 3, 13, 6), (1, 40, 2, 32, 32)]
SHAPES += [(1, 2, 2, 1100, 1040), (1, 1, 70, 16, 16)]


@STYLES
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(library, shape, dtype, interleaved):
    check(library, shape, dtype, interleaved=interleaved)


@STYLES
@pytest.mark.parametrize("dtype, table_dtype", [(BF16, BF16), (F16, F16), (F16, F32)], ids=str)
def test_dtypes(library, dtype, table_dtype, interleaved):
    check(library, (2, 3, 4, 48, 32), dtype, table_dtype, interleaved=interleaved)
    check(library, (2, 3, 4, 47, 46), dtype, table_dtype, interleaved=interleaved)


@STYLES
def test_offsets(library, interleaved):
    for offsets in (7, torch.tensor([9, 2])):
        check(library, (2, 6, 5, 32, 32), BF16, offsets=offsets, interleaved=interleaved)


def test_strides(library):
    check(library, (2, 5, 3, 64, 64), BF16, view=lambda x: x.transpose(1, 2))
    check(library, (2, 3, 10, 64, 64), view=lambda x: x[:, :, ::2])
    check(library, (2, 3, 5, 33, 16), view=lambda x: x[..., :32])


@STYLES
@pytest.mark.parametrize("name", ["x", "cos", "sin", "out"])
def test_misaligned_pointers(library, name, interleaved):
    check(library, (2, 3, 2, 32, 32), BF16, misaligned=(name,), interleaved=interleaved)


def test_a_position_without_angles_becomes_nan(library):
    x, (cos, sin) = torch.randn(2, 3, 2, 24), tables(6, 16)
    for offsets in ([-1, 0], [0, 5], [-(2**40), 2**40]):
        out = on(library)(x, cos, sin, offsets=torch.tensor(offsets))
        outside = [[not 0 <= o + t < 6 for t in range(2)] for o in offsets]
        assert torch.equal(out[..., :16].isnan(), torch.tensor(outside)[:, None, :, None].expand(2, 3, 2, 16))
        assert torch.equal(out[..., 16:], x[..., 16:])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, 1e-30])
def test_special_values(library, value):
    x, cos_sin = torch.randn(1, 2, 3, 24), tables(3, 16)
    x[0, 1, 2, 3] = x[0, 0, 1, 20] = value
    oracle.check(*[bound(f, cos_sin) for f in (on(library), reference.rotary)], [x])


def test_same_bits_under_any_schedule(library):
    x, (cos, sin) = torch.randn(2, 6, 3, 64).bfloat16(), tables(3, 64)
    results = []
    for seed in (0, 1, 5):
        library.configure(seed)
        results.append(on(library)(x, cos, sin))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8, 8), (2, 0, 3, 8, 8), (2, 2, 0, 8, 8)])
def test_empty(library, shape):
    check(library, shape)


def test_launches_on_the_given_device_and_stream(library):
    stream = ctypes.c_void_p(0x1230)
    given = (*tables(3, 8), None, 0, False, False)
    launched(torch.randn(1, 2, 3, 8), library, (), *given, where=(2, stream))
    assert library.c.emu_last_device() == 2
    assert library.c.emu_last_stream() == stream.value
    assert library.c.emu_current_device() == 0


def test_messages(library):
    def rotary(dtype=0, table_dtype=0, device=0):
        shape = shape_of(library, (1, 1, 1, 8, 4, 1, 8, 8, 8, 0), dtype, table_dtype, False, False)
        buffers = [library.copy(torch.ones(8)) for _ in range(3)]
        library.call("rotary", *buffers, None, library.empty((8,)), shape, device, None)

    with pytest.raises(
        KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid device ordinal$"
    ):
        rotary(device=17)
    with pytest.raises(KernelError, match=r"^rotary: dtype must be f32, bf16 or f16, got 3$"):
        rotary(dtype=3, table_dtype=3)
    with pytest.raises(KernelError, match=r"^rotary: table_dtype must be dtype or f32, got 2$"):
        rotary(dtype=1, table_dtype=2)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
