"""conv2d: the public function, as every part of torch meets it."""

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import conv2d as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# x, weight, stride, padding, dilation, groups
SHAPES = {
    "1x1": ((2, 40, 9, 7), (36, 40, 1, 1), 1, 0, 1, 1),
    "1x1-strided": ((3, 32, 9, 8), (33, 32, 1, 1), 2, 0, 1, 1),
    "3x3": ((2, 64, 9, 11), (40, 64, 3, 3), 1, 1, 1, 1),
    "3x3-many-channels": ((3, 256, 7, 6), (70, 256, 3, 3), 1, 1, 1, 1),
    "3x3-grouped": ((2, 70, 8, 9), (96, 35, 3, 3), 1, (2, 0), 1, 2),
    "3x3-strided": ((2, 20, 14, 13), (24, 20, 3, 3), 2, 1, 1, 1),
    "3x3-dilated": ((1, 32, 12, 13), (16, 32, 3, 3), 1, 2, 2, 1),
    "3x3-odd-channels": ((2, 33, 7, 7), (17, 33, 3, 3), 1, 1, 1, 1),
    "7x7-stem": ((2, 3, 30, 27), (16, 3, 7, 7), 2, 3, 1, 1),
    "grouped": ((2, 40, 8, 9), (24, 20, 3, 3), 1, 1, 1, 2),
    "many-groups": ((2, 32, 7, 6), (64, 4, 3, 3), 2, 1, 1, 8),
    "depthwise": ((2, 37, 9, 8), (37, 1, 3, 3), 1, 1, 1, 37),
    "depthwise-multiplied": ((1, 6, 9, 8), (18, 1, 5, 3), (2, 1), (2, 0), 1, 6),
    "asymmetric": ((1, 16, 11, 19), (8, 16, 1, 5), (1, 3), (0, 2), (1, 2), 1),
    "stride-over-kernel": ((1, 17, 11, 11), (9, 17, 2, 2), 3, 0, 1, 1),
    "dilation-and-stride": ((2, 16, 15, 14), (9, 16, 3, 3), 2, 2, 3, 1),
    "padding-over-kernel": ((1, 5, 4, 4), (6, 5, 2, 2), 1, 3, 1, 1),
    "one-pixel": ((4, 70, 1, 1), (65, 70, 1, 1), 1, 0, 1, 1),
    "kernel-of-the-image": ((2, 24, 5, 6), (35, 24, 5, 6), 1, 0, 1, 1),
    "rows-of-many-tiles": ((1, 16, 5, 100), (16, 16, 3, 3), 1, 1, 1, 1),
    "many-images": ((9, 16, 7, 7), (48, 16, 3, 3), 1, 1, 1, 1),
}


def tensors(name="3x3", dtype=torch.float32, bias=False, channels_last=True):
    x, weight, *_ = SHAPES[name]
    x = torch.randn(x).to(dtype)
    fan_in = torch.Size(weight[1:]).numel()
    weight = (torch.randn(weight) / fan_in**0.5).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return [x, weight, torch.randn(weight.shape[0]).to(dtype) if bias else None]


def both(name, **options):
    """Our function and the reference, of x, weight and bias."""
    geometry = SHAPES[name][2:]
    return (
        lambda x, w, b=None: lk.conv2d(x, w, b, *geometry, **options),
        lambda x, w, b=None: reference.conv2d(x, w, b, *geometry, **options),
    )


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, dtype):
    oracle.check(*both(name), tensors(name, dtype, bias=True))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_float32(dtype):
    x, weight, bias = tensors(dtype=dtype, bias=True)
    oracle.check(*both("3x3"), [x, weight, bias.float() * 1.001])


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["1x1", "3x3-strided", "7x7-stem"])
def test_weights_in_channels_last_and_inputs_that_are_not(name, dtype):
    x, weight, _ = tensors(name, dtype, channels_last=False)
    oracle.check(*both(name), [x, weight.to(memory_format=torch.channels_last)])


@pytest.mark.every_backend
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradients", [True, False])
def test_epilogue(activation, dtype, gradients):
    x, weight, bias = tensors("3x3", dtype, bias=True)
    residual = torch.randn(2, 40, 9, 11).to(dtype).to(memory_format=torch.channels_last)
    scale, shift = torch.rand(40) + 0.5, torch.randn(40)

    def of(f):
        return lambda x, w, b, r, scale, shift: f(
            x, w, b, 1, 1, activation=activation, residual=r, scale=scale, shift=shift
        )

    inputs = [x, weight, bias, residual, scale, shift]
    oracle.check(of(lk.conv2d), of(reference.conv2d), inputs, gradients=gradients)


@pytest.mark.every_backend
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_residual_and_activation_without_a_scale(activation):
    x, weight, bias = tensors("3x3-strided", bias=True)
    residual = torch.randn(2, 24, 7, 7) * 4

    def of(f):
        return lambda x, w, b, r: f(x, w, b, 2, 1, activation=activation, residual=r)

    oracle.check(of(lk.conv2d), of(reference.conv2d), [x * 3, weight, bias, residual])


@pytest.mark.every_backend
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(2, 3), (4, 5)])
def test_padding_by_name(padding, kernel):
    x, weight = torch.randn(2, 8, 9, 10), torch.randn(6, 8, *kernel)
    oracle.check(
        lambda x, w: lk.conv2d(x, w, padding=padding, dilation=(1, 2)),
        lambda x, w: F.conv2d(x, w, padding=padding, dilation=(1, 2)),
        [x, weight],
    )


@pytest.mark.every_backend
def test_one_image_without_a_batch():
    x, weight = torch.randn(8, 9, 10), torch.randn(6, 8, 3, 3)
    oracle.check(lk.conv2d, F.conv2d, [x, weight])


@pytest.mark.every_backend
def test_an_empty_batch_has_zero_gradients():
    x, weight = torch.randn(0, 8, 9, 10, requires_grad=True), torch.randn(6, 8, 3, 3, requires_grad=True)
    y = lk.conv2d(x, weight, padding=1)
    assert y.shape == (0, 6, 9, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.every_backend
def test_memory_formats():
    x, weight, _ = tensors()
    y = lk.conv2d(x, weight.requires_grad_(), padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.every_backend
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("memory", ["slice", "every second", "expanded"])
def test_a_weight_that_is_part_of_another(memory, groups):
    whole = torch.randn(18, 16, 4, 3)
    weight = {
        "slice": whole[2:10, : 8 // groups, 1:],
        "every second": whole[2::2, : 16 // groups : 2, ::2],
        "expanded": whole[:1, : 8 // groups].expand(8, -1, -1, -1),
    }[memory]
    x = torch.randn(2, 8, 9, 10)
    oracle.check(
        lambda x, w: lk.conv2d(x, w, padding=1, groups=groups),
        lambda x, w: F.conv2d(x, w.contiguous(), padding=1, groups=groups),
        [x, weight],
    )


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["3x3", "7x7-stem", "3x3-odd-channels", "stride-over-kernel"])
def test_what_is_not_finite_reaches_only_the_outputs_that_see_it(name, dtype, value):
    x, weight, _ = tensors(name, dtype)
    x[0, 3 % x.shape[1], 6, 6] = value
    ours, theirs = both(name)
    actual = oracle.outputs_and_gradients(ours, [x, weight])
    # In float64: torch's bfloat16 convolution lets it through the zeros that channels are filled up with.
    expected = oracle.outputs_and_gradients(theirs, [x.double(), weight.double()])
    for key, truth in expected.items():
        assert torch.equal(actual[key].isfinite(), truth.isfinite()), key
    assert not actual["output 0"].isfinite().all()


@pytest.mark.every_backend
@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_magnitudes(scale):
    x, weight, _ = tensors()
    oracle.check(*both("3x3"), [x * scale, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64, 30, 30, 64, 3), (5, 128, 14, 14, 96, 1), (2, 256, 7, 7, 128, 3)])
def test_same_bits_for_any_number_of_threads(shape, dtype):
    N, C, H, W, K, R = shape
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        inputs = [torch.randn(N, C, H, W).to(dtype), torch.randn(K, C, R, R).to(dtype)]
        results.append(oracle.outputs_and_gradients(lambda x, w: lk.conv2d(x, w, padding=R // 2), inputs))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for name in ("1x1", "3x3", "3x3-strided", "7x7-stem", "grouped"):
        oracle.check(*both(name, activation="relu"), tensors(name, dtype, bias=True))
