"""The CUDA kernels of layer norm, executed on the CPU (tests/cuda_on_cpu) against the float64 reference."""

import ctypes
import itertools

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops.norms import EPS, plain, tensors

import oracle

SOURCES = (build.ROOT / "csrc/cuda/layer_norm.cu", build.HERE / "entries/layer_norm.cpp")
# Of nvcc's PTX, whose translation takes its time: every width, with weights of the data's type and of float.
PTX_KERNELS = r"kernelI(f|13__nv_bfloat16[fE]|6__half[SE])"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

library = fixture(*SOURCES, ptx_kernels=PTX_KERNELS)


class LayerNorm:
    """The kernels as a differentiable function of x, residual, weight, bias."""

    def __init__(self, library, partials=3, centered=True, weight_gradients=True, misaligned=()):
        self.library, self.partials, self.centered = library, partials, centered
        self.weight_gradients, self.misaligned = weight_gradients, misaligned

    def __call__(self, x, residual=None, weight=None, bias=None):
        y, total = LayerNormFunction.apply(self, x, residual, weight, bias)
        return y if residual is None else (y, total)

    def shape(self, x, weight_dtype):
        make = self.library.c.layer_norm_shape
        make.restype = ctypes.c_void_p
        rows, cols = x.shape
        arguments = [ctypes.c_int64(n) for n in (rows, cols, self.partials)]
        return ctypes.c_void_p(make(*arguments, DTYPES[x.dtype], DTYPES[weight_dtype], int(self.centered)))

    def copy(self, name, tensor):
        return self.library.copy(tensor, misaligned=name in self.misaligned)

    def empty(self, name, like, dtype=None):
        return self.library.empty(like.shape, dtype or like.dtype, misaligned=name in self.misaligned)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, *tensors):
        x, residual, weight, bias = tensors
        weight_dtype = next((t.dtype for t in (weight, bias) if t is not None), torch.float32)
        total = None if residual is None else op.empty("sum", x)
        y, rstd = op.empty("y", x), op.library.empty(x.shape[:1])
        mean = op.library.empty(x.shape[:1]) if op.centered else None
        names = ("x", "residual", "weight", "bias")
        inputs = [op.copy(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        shape = op.shape(x, weight_dtype)
        op.library.call("layer_norm_forward", *inputs, total, y, mean, rstd, shape, EPS, 0, None)
        ctx.op, ctx.weight_dtype, ctx.has_bias = op, weight_dtype, bias is not None
        total = x if residual is None else total.tensor()
        statistics = mean and mean.tensor(), rstd.tensor()
        ctx.save_for_backward(x, residual, weight, total, *statistics)
        return y.tensor(), total.clone()

    @staticmethod
    def backward(ctx, dy, dtotal):
        op = ctx.op
        x, residual, weight, total, mean, rstd = ctx.saved_tensors
        names = ("dy", "dsum", "sum", "mean", "rstd", "weight")
        values = (dy, dtotal if residual is not None else None, total, mean, rstd, weight)
        inputs = [op.copy(name, value) for name, value in zip(names, values, strict=True)]
        dx = op.empty("dx", x)
        wanted = op.weight_gradients
        dweight = op.empty("dweight", weight) if wanted and weight is not None else None
        dbias = op.library.empty(x.shape[1:], ctx.weight_dtype) if wanted and ctx.has_bias else None
        partial = op.library.empty((op.partials, 2, x.shape[1])) if dweight or dbias else None
        shape = op.shape(x, ctx.weight_dtype)
        op.library.call("layer_norm_backward", *inputs, dx, dweight, dbias, partial, shape, 0, None)
        dx = dx.tensor()
        return (
            None,
            dx,
            None if residual is None else dx,
            dweight and dweight.tensor(),
            dbias and dbias.tensor(),
        )


def check(library, inputs, centered=True, **options):
    gradients = options.pop("gradients", True)
    op = LayerNorm(library, centered=centered, **options)
    oracle.check(op, plain(centered), inputs, gradients=gradients)


SHAPES = [(1, 1), (5, 1), (3, 1001), (17, 129), (33, 200), (20, 768), (2, 5000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_shapes(library, rows, cols, dtype):
    check(library, tensors(rows, cols, dtype, torch.float32))


@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule(library, seed):
    library.configure(seed)
    check(library, tensors(13, 1040, torch.bfloat16, torch.float32), partials=4)


TRANSLATED = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
OTHER_DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("dtype, weight_dtype", TRANSLATED + OTHER_DTYPES, ids=str)
def test_dtypes(library, dtype, weight_dtype):
    if library.flavour == "ptxcheck" and (dtype, weight_dtype) in OTHER_DTYPES:
        pytest.skip("this PTX is not translated, to save time")
    check(library, tensors(6, 72, dtype, weight_dtype))
    check(library, tensors(6, 71, dtype, weight_dtype))


@pytest.mark.parametrize("centered", [True, False], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("weight_gradients", [True, False], ids=["weight gradients", "dx only"])
def test_what_may_be_absent(library, centered, weight_gradients):
    optional = ("residual", "weight", "bias") if centered else ("residual", "weight")
    for present in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(4)):
        for cols in (40, 39):
            inputs = tensors(5, cols, torch.bfloat16, torch.float32, present)
            if not weight_gradients:  # only x and residual are leaves then
                op = LayerNorm(library, centered=centered, weight_gradients=False)
                weights, both = inputs[2:], plain(centered)
                oracle.check(
                    lambda *data, op=op, weights=weights: op(*data, *weights),
                    lambda *data, both=both, weights=weights: both(*data, *as_wide(weights, data[0])),
                    inputs[:2],
                )
            else:
                check(library, inputs, centered)


def as_wide(weights, like):
    """In float64 where the reference runs in it."""
    return [w.double() if w is not None and like.dtype == torch.float64 else w for w in weights]


@pytest.mark.parametrize("centered", [True, False], ids=["layer_norm", "rms_norm"])
def test_statistics_that_are_not_wanted(library, centered):
    x = torch.randn(5, 40)
    op, inputs, y = (
        LayerNorm(library, centered=centered),
        [library.copy(x)] + 4 * [None],
        library.empty((5, 40)),
    )
    library.call("layer_norm_forward", *inputs, y, None, None, op.shape(x, x.dtype), EPS, 0, None)
    torch.testing.assert_close(y.tensor(), plain(centered)(x))


@pytest.mark.parametrize("rows, partials", [(0, 0), (0, 3), (2, 5), (7, 4), (9, 9), (12, 1)])
def test_runs_of_rows(library, rows, partials):
    for cols in (24, 23):
        check(library, tensors(rows, cols), partials=partials)


@pytest.mark.parametrize("cols", [24, 23, 8200])
def test_partial_sums_are_those_of_consecutive_rows(library, cols):
    rows, partials, per_run = 7, 5, 2  # the last run is empty, the one before it short
    op = LayerNorm(library, partials)
    x, _, weight, bias = tensors(rows, cols, present=("weight", "bias"))
    dy = torch.randn(rows, cols)
    mean, rstd = x.mean(1), (x.var(1, unbiased=False) + EPS).rsqrt()
    inputs = [library.copy(t) for t in (dy, None, x, mean, rstd, weight)]
    outputs = [library.empty(t.shape) for t in (x, weight, bias)]
    partial = library.empty((partials, 2, cols))
    library.call("layer_norm_backward", *inputs, *outputs, partial, op.shape(x, torch.float32), 0, None)
    normalised = (x - mean[:, None]) * rstd[:, None]
    expected = torch.zeros(partials, 2, cols)
    for row in range(rows):
        expected[row // per_run] += torch.stack((dy[row] * normalised[row], dy[row]))
    actual = partial.tensor()
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[4], torch.zeros(2, cols))
    in_order = torch.zeros(2, cols)
    for run in actual:
        in_order += run
    assert torch.equal(torch.stack([o.tensor() for o in outputs[1:]]), in_order)


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "sum", "y", "dy", "dsum", "dx"])
def test_misaligned_pointers(library, name):
    check(library, tensors(4, 64, torch.bfloat16, torch.float32), misaligned=(name,))


@pytest.mark.parametrize("rows, cols", [(2, 16400), (1, 100_000), (1, 100_003), (3, 8200)])
def test_rows_too_wide_for_registers(library, rows, cols):
    check(library, tensors(rows, cols, torch.bfloat16, torch.float32))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("centered", [True, False], ids=["layer_norm", "rms_norm"])
def test_special_values(library, value, centered):
    x, _, weight, bias = tensors(3, 48, present=("weight", "bias"))
    x[1, 7] = value
    x[2] = value
    check(library, [x, None, weight, bias if centered else None], centered, gradients=False)


def test_same_bits_every_time(library):
    inputs = tensors(21, 200, torch.bfloat16, torch.float32)
    results = []
    for seed in (0, 5):
        library.configure(seed)
        results.append(oracle.outputs_and_gradients(LayerNorm(library), inputs))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_launches_on_the_given_device_and_stream(library):
    x = torch.randn(2, 8)
    op, (y, mean, rstd) = LayerNorm(library), (library.empty(s) for s in ((2, 8), 2, 2))
    stream = ctypes.c_void_p(0x1230)
    arguments = (library.copy(x), None, None, None, None, y, mean, rstd, op.shape(x, x.dtype), EPS, 2, stream)
    library.call("layer_norm_forward", *arguments)
    assert library.c.emu_last_device() == 2
    assert library.c.emu_last_stream() == stream.value
    assert library.c.emu_current_device() == 0


def test_messages(library):
    op, x = LayerNorm(library), torch.randn(2, 1024)
    outputs = [library.empty(s) for s in (x.shape, 2, 2)]

    def forward(dtype=0, weight_dtype=0, device=0):
        make = library.c.layer_norm_shape
        shape = ctypes.c_void_p(
            make(ctypes.c_int64(2), ctypes.c_int64(1024), ctypes.c_int64(1), dtype, weight_dtype, 1)
        )
        nothing = (None,) * 4
        library.call("layer_norm_forward", library.copy(x), *nothing, *outputs, shape, EPS, device, None)

    op.shape(x, x.dtype)
    with pytest.raises(
        KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid device ordinal$"
    ):
        forward(device=17)
    with pytest.raises(KernelError, match=r"^layer_norm_forward: dtype must be f32, bf16 or f16, got 3$"):
        forward(dtype=3, weight_dtype=3)
    with pytest.raises(KernelError, match=r"^layer_norm_forward: weight_dtype must be dtype or f32, got 2$"):
        forward(dtype=1, weight_dtype=2)
    library.configure(shared_max=64)
    with pytest.raises(KernelError, match=r"^cudaLaunchKernelEx failed at layer_norm.cu:\d+: .*limit 64$"):
        forward()


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
