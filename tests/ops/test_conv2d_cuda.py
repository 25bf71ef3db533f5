"""The CUDA kernels of conv2d, executed on the CPU (tests/cuda_on_cpu) against the float64 reference."""

import ctypes
from ctypes import c_int, c_int64, c_void_p

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.attention import FLAVOURS, structure
from cuda_on_cpu.library import KernelError, fixture, run_under_asan, with_long

import oracle
from lspm_kernels import compiled, conv2d_scratch
from lspm_kernels.conv2d_checks import ACTIVATIONS
from lspm_kernels.dispatch import Backend
from lspm_kernels.ops.conv2d import convolve
from lspm_kernels.reference import conv2d as reference

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = {torch.float32: 0, BF16: 1, F16: 2}
FILES = [build.ROOT / f"csrc/cuda/{name}.cu" for name in ("conv2d", "conv2d_backward")]
# Of nvcc's PTX, whose translation takes its time: for one type.
PTX_KERNELS = "13__nv_bfloat16"

Epilogue = structure("Conv2dEpilogue", scale=c_void_p, shift=c_void_p, residual=c_void_p, activation=c_int)
Shape = structure(
    "Conv2dShape", **dict.fromkeys(
        "N H W C out_h out_w K R S stride_h stride_w pad_h pad_w dilate_h dilate_w groups".split(), c_int64
    ), weight_strides=c_int64 * 4, dtype=c_int,
)  # fmt: skip

emulator = fixture(
    *FILES, build.HERE / "entries/conv2d.cpp", ptx_kernels=PTX_KERNELS, flavours=with_long(FLAVOURS)
)


@pytest.fixture
def library(emulator, monkeypatch):
    monkeypatch.setattr(compiled, "cuda", None)  # tests put the emulator there
    return emulator


def flat(x):
    """The memory that x covers, gaps included."""
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach,), (1,))


class Emulated:
    """The two functions of the CUDA module, on the emulator."""

    def __init__(self, library, misaligned=(), where=(0, None)):
        self.library, self.misaligned, self.where = library, misaligned, where

    def copy(self, name, tensor):
        return self.library.copy(tensor, name in self.misaligned)

    def call(self, name, x, weight, y, geometry, *arguments):
        N, H, W, C = x.shape
        stride, padding, dilation, groups = geometry
        sizes = N, H, W, C, *y.shape[1:3], weight.shape[0], *weight.shape[2:], *stride, *padding, *dilation
        shape = Shape(*sizes, groups, (c_int64 * 4)(*weight.stride()), DTYPES[x.dtype])
        self.library.call(name, *arguments, ctypes.byref(shape), *self.where)

    def conv2d_forward(
        self, x, weight, scale, shift, residual, y, statistics, geometry, activation, threads, packed
    ):
        assert statistics is None
        given = self.copy("scale", scale), self.copy("shift", shift), self.copy("residual", residual)
        epilogue = Epilogue(*(t and t.pointer for t in given), activation)
        out = self.library.empty(y.shape, y.dtype, "y" in self.misaligned)
        tensors = self.copy("x", x), self.copy("weight", flat(weight)), ctypes.byref(epilogue), out
        scratch = self.library.empty(packed.shape, packed.dtype)
        self.call("conv2d_forward", x, weight, y, geometry, *tensors, scratch)
        y.copy_(out.tensor())

    def conv2d_backward(self, dz, x, weight, dx, dweight, geometry, threads, packed, partial):
        inputs = self.copy("dz", dz), self.copy("x", x), self.copy("weight", flat(weight))
        of_x = dx if dx is None else self.library.empty(dx.shape, dx.dtype, "dx" in self.misaligned)
        of_weight = self.copy("dweight", dweight if dweight is None else flat(dweight))
        scratch, sums = (t if t is None else self.library.empty(t.shape, t.dtype) for t in (packed, partial))
        outputs = of_x, of_weight, scratch, sums, 0 if sums is None else len(partial)
        self.call("conv2d_backward", x, weight, dz, geometry, *inputs, *outputs)
        if dx is not None:
            dx.copy_(of_x.tensor())
        if dweight is not None:
            dweight.copy_(of_weight.tensor().as_strided(weight.shape, weight.stride()))


# As the table's row, but on tensors of the CPU.
ROW = Backend("emulated", "cpu", (), conv2d_scratch.conv2d_forward, conv2d_scratch.conv2d_backward, None)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def on(library, **how):
    """conv2d on the emulator, with the arguments of the reference; bias and shift are one."""

    def conv2d(
        x, w, bias, stride=1, padding=0, dilation=1, groups=1, activation=None, residual=None,
        scale=None, shift=None,
    ):  # fmt: skip
        stride, padding, dilation = map(pair, (stride, padding, dilation))
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
        ]
        geometry = [*stride, *padding, *dilation, groups]
        given = scale, bias if shift is None else shift, residual
        compiled.cuda = Emulated(library, **how)
        return convolve(ROW, x, w, *given, size, geometry, ACTIVATIONS.index(activation), False)[0]

    return conv2d


# x, weight, stride, padding, dilation, groups. A block has 128 pixels, 64 or 128 filters, 32 terms at a time.
SHAPES = {
    "1x1": ((2, 40, 9, 8), (36, 40, 1, 1), 1, 0, 1, 1),
    "1x1-strided": ((2, 32, 9, 8), (72, 32, 1, 1), 2, 0, 1, 1),
    "3x3": ((2, 24, 9, 8), (40, 24, 3, 3), 1, 1, 1, 1),
    "3x3-strided": ((2, 16, 8, 9), (24, 16, 3, 3), 2, 1, 1, 1),
    "3x3-dilated": ((1, 8, 10, 11), (16, 8, 3, 3), 1, 2, 2, 1),
    "3x3-odd": ((2, 9, 5, 7), (13, 9, 3, 3), 1, 1, 1, 1),
    "7x7-stem": ((1, 3, 15, 14), (16, 3, 7, 7), 2, 3, 1, 1),
    "grouped": ((2, 32, 5, 6), (48, 16, 3, 3), 1, 1, 1, 2),
    "groups-of-few": ((1, 12, 7, 6), (18, 2, 3, 3), 2, 1, 1, 6),
    "depthwise": ((1, 5, 6, 7), (5, 1, 3, 3), 1, 1, 1, 5),
    "asymmetric": ((1, 16, 6, 13), (8, 16, 1, 5), (1, 3), (0, 2), (1, 2), 1),
    "stride-over-kernel": ((1, 8, 8, 8), (9, 8, 2, 2), 3, 0, 1, 1),
    "dilation-and-stride": ((1, 16, 11, 10), (8, 16, 3, 3), 2, 2, 3, 1),
    "stride-and-dilation-alike": ((1, 8, 13, 14), (8, 8, 3, 3), 4, 1, 2, 1),
    "padding-over-kernel": ((1, 8, 3, 3), (8, 8, 2, 2), 1, 3, 1, 1),
    "many-filters": ((1, 16, 3, 4), (200, 16, 1, 1), 1, 0, 1, 1),
    "one-pixel": ((3, 24, 1, 1), (8, 24, 1, 1), 1, 0, 1, 1),
}


def tensors(name, dtype=BF16):
    x, weight, *_ = SHAPES[name]
    fan_in = torch.Size(weight[1:]).numel()
    return [torch.randn(x).to(dtype), (torch.randn(weight) / fan_in**0.5).to(dtype)]


def check(library, name, inputs=None, *, gradients=True, options=None, **how):
    geometry, options = SHAPES[name][2:], options or {}
    forms = (on(library, **how), reference.conv2d)
    oracle.check(
        *(lambda x, w, f=f: f(x, w, None, *geometry, **options) for f in forms), inputs or tensors(name),
        gradients=gradients,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(library, name):
    check(library, name)


@pytest.mark.parametrize("name", ["3x3", "7x7-stem", "many-filters"])
def test_the_other_dtype(library, name):
    if library.flavour == "ptxcheck":
        pytest.skip("this PTX is not translated, to save time")
    check(library, name, tensors(name, F16))


@pytest.mark.parametrize("name", ["3x3-strided", "many-filters", "3x3-odd", "grouped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(library, name, activation):
    inputs = tensors(name)
    like = reference.conv2d(*inputs, None, *SHAPES[name][2:])
    K = like.shape[1]
    options = {"activation": activation, "residual": torch.randn_like(like) * 2}
    options |= {"scale": torch.rand(K) * 4 + 0.5, "shift": torch.randn(K)}
    for absent in ("", "residual", "scale", "shift"):
        given = {key: value for key, value in options.items() if key != absent}
        check(library, name, inputs, gradients=False, options=given)


@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3-strided", "grouped", "3x3-odd"])
def test_weights_in_any_layout(library, name):
    x, weight = tensors(name)
    for lies in (
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        assert lies.shape == weight.shape
        check(library, name, [x, lies])


@pytest.mark.parametrize("pointer", ["x", "weight", "residual", "y", "dz", "dx"])
@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_misaligned_pointers(library, name, pointer):
    x, weight = tensors(name)
    weight = weight.contiguous(memory_format=torch.channels_last)
    options = {"residual": torch.randn(reference.conv2d(x, weight, None, *SHAPES[name][2:]).shape).to(BF16)}
    check(library, name, [x, weight], options=options, misaligned=(pointer,))


@pytest.mark.parametrize("partials", [1, 3, 40])
@pytest.mark.parametrize("name", ["3x3", "7x7-stem", "one-pixel"])
def test_runs_of_pixels(library, name, partials, monkeypatch):
    monkeypatch.setattr(conv2d_scratch, "partials", lambda *sizes: partials)
    check(library, name)


def test_runs_occupy_the_gpu_where_they_are_long_enough():
    assert conv2d_scratch.partials(64, 9 * 64, 1, 32 * 56 * 56) == 51  # 5 blocks to a run
    assert conv2d_scratch.partials(512, 9 * 512, 1, 32 * 7 * 7) == 1
    assert conv2d_scratch.partials(16, 9 * 16, 2, 1000) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3x3", "7x7-stem", "3x3-odd", "stride-over-kernel"])
def test_what_is_not_finite_reaches_only_the_outputs_that_see_it(library, name, value):
    x, weight = tensors(name)
    x[0, 1, 3, 3] = value
    geometry = SHAPES[name][2:]
    actual, expected = (
        oracle.outputs_and_gradients(lambda x, w, f=f: f(x, w, None, *geometry), inputs)
        for f, inputs in ((on(library), [x, weight]), (reference.conv2d, [x.double(), weight.double()]))
    )
    for key, truth in expected.items():
        assert torch.equal(actual[key].isfinite(), truth.isfinite()), key
    assert not actual["output 0"].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite(library, activation):
    x, weight = torch.tensor([float("nan"), float("inf"), 3e38, -300.0]), torch.ones(1, 1, 1, 1)
    x, weight = x.view(1, 1, 2, 2).to(BF16), weight.to(BF16)
    actual = on(library)(x, weight, None, activation=activation)
    # In float64: torch's gelu of an infinite bfloat16 is nan.
    truth = reference.conv2d(x.double(), weight.double(), activation=activation)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(truth))


@pytest.mark.parametrize("name", ["3x3", "3x3-odd", "7x7-stem", "many-filters"])
def test_same_bits_under_any_schedule(library, name):
    inputs, geometry, results = tensors(name), SHAPES[name][2:], []
    for seed in range(3):
        library.configure(seed)
        results.append(oracle.outputs_and_gradients(lambda *t: on(library)(*t, None, *geometry), inputs))
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("name", ["3x3", "many-filters", "3x3-odd"])
def test_shared_memory_without_bank_conflicts(library, name):
    library.counters()
    check(library, name)
    counters = library.counters()
    assert counters["mma"] and counters["cp_async"] and not counters["ldmatrix_conflicts"]


def test_statistics_are_those_of_y(monkeypatch):
    class Cuda:
        batch_norm_act_statistics = staticmethod(
            lambda *args: compiled.cpu.batch_norm_act_statistics(*args[:-1], 1)
        )
        conv2d_forward = staticmethod(lambda *args: args[5].normal_())

    monkeypatch.setattr(compiled, "cuda", Cuda)
    x, weight = tensors("1x1")
    geometry = [1, 1, 0, 0, 1, 1, 1]
    y, statistics = convolve(ROW, x, weight, None, None, None, x.shape[2:], geometry, 0, True)
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    torch.testing.assert_close(statistics, torch.stack((mean, variance)))


def test_launches_on_the_given_device_and_stream(library):
    stream = c_void_p(0x1230)
    x, weight = (t.requires_grad_() for t in tensors("1x1"))
    on(library, where=(2, stream))(x, weight, None).sum().backward()
    assert library.c.emu_last_device() == 2
    assert library.c.emu_last_stream() == stream.value
    assert library.c.emu_current_device() == 0


def test_messages(library):
    x, weight = (t.float().requires_grad_() for t in tensors("1x1"))
    with pytest.raises(KernelError, match=r"^conv2d_forward: dtype must be bf16 or f16, got 0$"):
        on(library)(x, weight, None)
    with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid"):
        on(library, where=(17, None))(x.bfloat16(), weight.bfloat16(), None)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_under_asan("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "not long")
