"""The Triton kernels of conv2d: what Triton compiles them to, executed on the CPU (tests/cuda_on_cpu)."""

import dataclasses

import pytest
import torch
from ops.test_conv2d import SHAPES, both, tensors

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import conv2d as ops
from lspm_kernels.reference import conv2d as reference

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import uninitialised

from lspm_kernels.triton import conv2d, conv2d_tiles
from lspm_kernels.triton.conv2d_tiles import Tile

pytestmark = pytest.mark.long  # its tiles take minutes to translate from empty caches
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
# Tiles that run in seconds here: on sm_80 not square, so that no size stands for another, and on sm_90 as
# tall as wgmma is.
SMALL = {80: Tile(32, 16, 16, 2, 2), 90: Tile(64, 16, 16, 4, 2)}
SMALL_WEIGHT = {80: Tile(16, 32, 16, 2, 2), 90: Tile(16, 64, 32, 4, 2)}
PRODUCTS = ["_correlate_kernel", "_correlate_kernel", "_weight_kernel"]
DIRECT = ["_direct_kernel", "_direct_kernel", "_direct_weight_kernel"]
# Beside those of test_conv2d: what only these kernels tell apart.
MORE = {
    "phases-without-a-tap": ((1, 5, 3, 4), (3, 5, 1, 1), 4, 0, 1, 1),
    "dilation-shares-a-factor": ((1, 16, 12, 11), (8, 16, 3, 2), (4, 3), (3, 2), (2, 3), 1),
    "direct-and-strided": ((2, 12, 9, 8), (24, 2, 3, 2), (2, 3), (2, 1), (1, 2), 6),
    "one-filter": ((1, 24, 6, 5), (1, 24, 3, 3), 1, 1, 1, 1),
    "stem-of-one-channel": ((2, 1, 12, 13), (20, 1, 5, 5), 2, 2, 1, 1),
}


@pytest.fixture(autouse=True)
def more_shapes(monkeypatch):
    for name, shape in MORE.items():
        monkeypatch.setitem(SHAPES, name, shape)


def forward(x, weight, scale, shift, residual, y, statistics, *rest):
    if statistics is not None:
        uninitialised(statistics)
    conv2d.forward(x, weight, scale, shift, residual, uninitialised(y), statistics, *rest)


def backward(dz, x, weight, dx, dweight, geometry):
    outputs = (None if t is None else uninitialised(t) for t in (dx, dweight))
    conv2d.backward(dz, x, weight, *outputs, geometry)


@pytest.fixture
def table(monkeypatch):
    """The op's table has the Triton row alone, for tensors on the CPU."""
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=forward, backward=backward)
    monkeypatch.setattr(ops, "BACKENDS", (here,))
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    return here


on_sm_80 = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)
on_sm_90 = pytest.mark.parametrize("gpu", [90], ids=["sm_90"], indirect=True)


@pytest.fixture
def driver(driver, table, monkeypatch):
    monkeypatch.setattr(conv2d, "tile_of", lambda *_: SMALL[driver.sm])
    monkeypatch.setattr(conv2d, "weight_tile_of", lambda *_: SMALL_WEIGHT[driver.sm])
    return driver


@on_sm_80
@pytest.mark.parametrize("name", [*SHAPES, *MORE])
def test_against_the_reference(driver, name):
    oracle.check(*both(name), tensors(name))
    direct = name in ("depthwise", "depthwise-multiplied", "direct-and-strided")
    assert driver.launches == (DIRECT if direct else PRODUCTS)


ON_TENSOR_CORES = ["3x3-strided", "3x3-odd-channels", "7x7-stem", "many-groups", "depthwise"]


@on_sm_80
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ON_TENSOR_CORES)
def test_two_byte_types(driver, name, dtype):
    oracle.check(*both(name), tensors(name, dtype, bias=True))


@on_sm_90
@pytest.mark.parametrize(
    "name", ["3x3-strided", *(pytest.param(name, marks=pytest.mark.long) for name in ON_TENSOR_CORES[1:])]
)
def test_two_byte_types_with_wgmma(driver, name):
    oracle.check(*both(name), tensors(name, BF16, bias=True))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["3x3", "7x7-stem", "grouped"])
def test_tiles_of_the_table(gpu, table, name, dtype):
    oracle.check(*both(name), tensors(name, dtype))
    assert not gpu.lint


@on_sm_80
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", None])
@pytest.mark.parametrize("name, dtype", [("3x3", F32), ("depthwise", BF16)])
def test_epilogue(driver, name, dtype, activation):
    x, weight, bias = tensors(name, dtype, bias=True)
    geometry = SHAPES[name][2:]
    residual = 3 * torch.randn_like(reference.conv2d(x, weight, None, *geometry))
    scale, shift = torch.rand(len(weight)) + 0.5, torch.randn(len(weight))

    def of(f):
        return lambda x, w, b, r, scale, shift: f(
            x, w, b, *geometry, activation=activation, residual=r, scale=scale, shift=shift
        )

    inputs = [x, weight, bias, residual, scale, shift]
    oracle.check(of(lk.conv2d), of(reference.conv2d), inputs, gradients=False)


@on_sm_80
@pytest.mark.parametrize("name", ["3x3-strided", "depthwise"])
def test_gradients_through_an_epilogue(driver, name):
    x, weight, bias = tensors(name, bias=True)
    geometry = SHAPES[name][2:]
    residual = torch.randn_like(reference.conv2d(x, weight, None, *geometry))

    def of(f):
        return lambda x, w, b, r: f(x, w, b, *geometry, activation="relu", residual=r)

    oracle.check(of(lk.conv2d), of(reference.conv2d), [x, weight, bias, residual])


@on_sm_80
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("name, dtype", [("3x3", F32), ("depthwise", F32), ("many-images", BF16)])
def test_statistics(driver, table, name, dtype, mean):
    x, weight, _ = tensors(name, dtype)
    shift = torch.full((len(weight),), mean)
    _, _, stride, padding, dilation, groups = SHAPES[name]
    expected = reference.conv2d(x, weight, None, stride, padding, dilation, groups)
    geometry = (stride, stride, padding, padding, dilation, dilation, groups)
    y, statistics = ops.convolve(table, x, weight, None, shift, None, expected.shape[2:], geometry, 0, True)
    values = y.double().permute(1, 0, 2, 3).flatten(1)
    truth = torch.stack((values.mean(1), values.var(1, unbiased=False)))
    values = values.float()
    plain = torch.stack((values.mean(1), values.var(1, unbiased=False)))
    oracle.compare("statistics", statistics, truth, plain)


@on_sm_80
@pytest.mark.parametrize("name, dtype", [("grouped", F32), ("3x3", BF16)])
def test_strides(driver, name, dtype):
    x, weight, _ = tensors(name, dtype, channels_last=False)
    forms = both(name)
    oracle.check(*(lambda x, w, f=f: f(x, w.transpose(2, 3)) for f in forms), [x, weight])
    oracle.check(*forms, [x, weight.to(memory_format=torch.channels_last)])


@on_sm_80
def test_only_the_gradients_that_are_wanted(driver):
    x, weight, _ = tensors("3x3")
    for wanted, kernel in ((x, "_correlate_kernel"), (weight, "_weight_kernel")):
        driver.launches.clear()
        y = lk.conv2d(x, weight, padding=1)
        wanted.requires_grad_()
        torch.autograd.grad(lk.conv2d(x, weight, padding=1), wanted, y)
        assert driver.launches == ["_correlate_kernel", "_correlate_kernel", kernel]
        wanted.requires_grad_(False)


@on_sm_80
def test_an_image_of_nothing_but_padding(driver):
    x = torch.empty(2, 8, 0, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(16, 8, 2, 3, requires_grad=True)
    y = lk.conv2d(x, weight, torch.arange(16.0), padding=1)
    assert torch.equal(y, torch.arange(16.0).view(1, -1, 1, 1).expand(2, 16, 1, 5))
    y.sum().backward()
    assert not weight.grad.any()


@on_sm_80
def test_places_of_64_bits(driver, monkeypatch):
    monkeypatch.setattr(conv2d, "index_of", lambda *_: tl.int64)
    oracle.check(*both("dilation-and-stride"), tensors("dilation-and-stride"))


def test_when_places_have_64_bits():
    few, many = (torch.empty(1).expand(n, 2**15, 2**10, 7) for n in (63, 64))
    assert conv2d_tiles.index_of(few, few) is tl.int32
    assert conv2d_tiles.index_of(few, many) is conv2d_tiles.index_of(many, few) is tl.int64


@pytest.mark.parametrize("pixels", [1, 127, 128, 1000, 54321])
@pytest.mark.parametrize("tiles", [1, 7, 300])
def test_runs_share_all_pixels(pixels, tiles):
    runs, run = conv2d_tiles.runs_of(pixels, tiles, 16)
    assert (runs - 1) * run < pixels <= runs * run
    assert run % 16 == 0 and (runs == 1 or run >= 128)


@on_sm_80
@pytest.mark.parametrize("name", ["many-images", "depthwise"])
def test_same_bits_under_any_schedule(driver, name):
    inputs = tensors(name, BF16)
    ours = both(name)[0]
    results = []
    for seed in range(3):
        driver.seed = seed
        results.append(oracle.outputs_and_gradients(ours, inputs))
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@on_sm_80
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3x3", "7x7-stem", "depthwise", "stride-over-kernel"])
def test_what_is_not_finite_reaches_only_the_outputs_that_see_it(driver, name, value):
    x, weight, _ = tensors(name)
    x[0, 2, 6, 6] = value
    actual, expected = (oracle.outputs_and_gradients(f, [x, weight]) for f in both(name))
    for key, truth in expected.items():
        assert torch.equal(actual[key].isfinite(), truth.isfinite()), key
    assert not actual["output 0"].isfinite().all()


# Channels, filters, kernel, groups, rows and columns: one for each row of the tables of tiles.
COMPILED = {
    "wide": (256, 256, 3, 1, 130),
    "few pixels": (256, 256, 3, 1, 14),
    "64": (64, 64, 3, 1, 130),
    "32": (32, 32, 1, 1, 130),
    "16": (64, 64, 3, 4, 130),
    "stem": (3, 64, 7, 1, 224),
    "wide stem": (3, 96, 4, 1, 224),
    "depthwise": (64, 64, 3, 64, 56),
}


@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "name",
    [
        "wide",
        "stem",
        *(pytest.param(n, marks=pytest.mark.long) for n in COMPILED if n not in ("wide", "stem")),
    ],
)
def test_compiles_without_spills(table, sm, dtype, name):
    channels, filters, kernel, groups, size = COMPILED[name]
    x, y = (torch.zeros(1, size, size, c, dtype=dtype) for c in (channels, filters))
    weight = torch.zeros(filters, channels // groups, kernel, kernel, dtype=dtype)
    scale, statistics = torch.zeros(filters), torch.zeros(2, filters)
    geometry = ((1, 1), (kernel // 2,) * 2, (1, 1), groups)
    with triton_driver.activated(sm, execute=False) as driver:
        conv2d.forward(x, weight, scale, scale, y, y, None, geometry, 4)
        conv2d.forward(x, weight, None, None, None, y, statistics, geometry, 0)
        conv2d.backward(y, x, weight, x, weight, geometry)
    assert {r.kernel for r in driver.resources} == set(DIRECT if name == "depthwise" else PRODUCTS)
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
