"""conv2d of groups on the cpu backend: depthwise, with more filters than channels, and groups of a few."""

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import conv2d as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# x, weight, stride, padding, dilation, groups. Vectors have 4 to 16 lanes, and 4 or 7 pixels go together.
SHAPES = {
    "one-vector-and-a-rest": ((2, 21, 9, 16), (21, 1, 3, 3), 1, 1, 1, 21),
    "pairs-and-a-rest": ((1, 83, 8, 9), (83, 1, 3, 3), 1, 1, 1, 83),
    "less-than-a-vector": ((2, 3, 7, 9), (3, 1, 3, 3), 1, 1, 1, 3),
    "3x3-strided": ((2, 48, 15, 16), (48, 1, 3, 3), 2, 1, 1, 48),
    "5x5": ((1, 48, 9, 17), (48, 1, 5, 5), 1, 2, 1, 48),
    "5x5-strided": ((1, 32, 14, 17), (32, 1, 5, 5), 2, 2, 1, 32),
    "7x7": ((1, 33, 7, 22), (33, 1, 7, 7), 1, 3, 1, 33),
    "7x7-strided": ((1, 32, 14, 15), (32, 1, 7, 7), 2, 3, 1, 32),
    "7x7-over-the-image": ((1, 32, 4, 3), (32, 1, 7, 7), 1, 3, 1, 32),
    "9-columns": ((1, 32, 5, 16), (32, 1, 1, 9), 1, (0, 4), 1, 32),
    "11-rows": ((1, 32, 14, 5), (32, 1, 11, 1), 1, (5, 0), 1, 32),
    "dilated": ((1, 32, 12, 13), (32, 1, 3, 3), 1, 2, 2, 32),
    "stride-of-three": ((1, 32, 13, 14), (32, 1, 3, 3), 3, 1, 1, 32),
    "stride-over-kernel": ((1, 32, 11, 11), (32, 1, 2, 2), 3, 0, 1, 32),
    "columns-unread": ((1, 32, 9, 10), (32, 1, 3, 3), 2, 0, 1, 32),
    "padding-over-kernel": ((1, 32, 4, 4), (32, 1, 2, 2), 1, 3, 1, 32),
    "one-pixel": ((3, 37, 1, 1), (37, 1, 3, 3), 1, 1, 1, 37),
    "multiplied": ((1, 34, 8, 9), (68, 1, 3, 3), 1, 1, 1, 34),
    "multiplied-by-three": ((1, 33, 8, 9), (99, 1, 3, 3), 2, 1, 1, 33),
    "groups-of-2": ((1, 66, 8, 9), (66, 2, 3, 3), 1, 1, 1, 33),
    "groups-of-4": ((2, 72, 8, 9), (72, 4, 3, 3), 1, 1, 1, 18),
    "groups-of-4-strided": ((1, 64, 9, 15), (64, 4, 3, 3), 2, 1, 1, 16),
    "groups-of-5": ((1, 75, 7, 8), (75, 5, 3, 3), 1, 1, 1, 15),
    "groups-of-6": ((1, 66, 7, 8), (66, 6, 3, 3), 1, 1, 1, 11),
    "groups-of-8": ((2, 72, 5, 8), (72, 8, 3, 3), 1, 1, 1, 9),
    "groups-of-8-5x5": ((1, 64, 7, 9), (64, 8, 5, 5), 1, 2, 1, 8),
    "groups-of-4-to-6": ((1, 68, 7, 9), (102, 4, 3, 3), 1, 1, 1, 17),
    "groups-of-6-to-2": ((1, 66, 7, 9), (22, 6, 3, 3), 1, 1, 1, 11),
    "groups-of-4-to-16": ((1, 40, 7, 9), (160, 4, 3, 3), 1, 1, 1, 10),
    "groups-of-12": ((1, 72, 7, 9), (72, 12, 3, 3), 1, 1, 1, 6),
    "groups-of-32": ((1, 64, 7, 9), (64, 32, 3, 3), 1, 1, 1, 2),
}
EPILOGUE = ("pairs-and-a-rest", "groups-of-4", "groups-of-6")


def tensors(name, dtype=torch.float32):
    x, weight, *_ = SHAPES[name]
    fan_in = torch.Size(weight[1:]).numel()
    weight = (torch.randn(weight) / fan_in**0.5).to(dtype)
    x = torch.randn(x).to(dtype).to(memory_format=torch.channels_last)
    return [x, weight, torch.randn(weight.shape[0]).to(dtype)]


def of(f, name, **options):
    geometry = SHAPES[name][2:]
    return lambda x, w, b=None: f(x, w, b, *geometry, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, dtype):
    oracle.check(of(lk.conv2d, name), of(reference.conv2d, name), tensors(name, dtype))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EPILOGUE)
def test_epilogue(name, dtype, activation):
    x, weight, bias = tensors(name, dtype)
    K, residual = weight.shape[0], torch.randn_like(lk.conv2d(x, weight, None, *SHAPES[name][2:])) * 4
    scale, shift = torch.rand(K) + 0.5, torch.randn(K)

    def with_all(f):
        return lambda x, w, b, r, scale, shift: f(
            x, w, b, *SHAPES[name][2:], activation=activation, residual=r, scale=scale, shift=shift
        )

    inputs = [x * 3, weight, bias, residual, scale, shift]
    oracle.check(with_all(lk.conv2d), with_all(reference.conv2d), inputs, gradients=False)


@pytest.mark.parametrize("name", ["3x3-strided", "groups-of-4", "groups-of-8"])
def test_weights_in_channels_last_and_inputs_that_are_not(name):
    x, weight, _ = tensors(name, torch.bfloat16)
    inputs = [x.contiguous(), weight.to(memory_format=torch.channels_last)]
    oracle.check(of(lk.conv2d, name), of(reference.conv2d, name), inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["pairs-and-a-rest", "columns-unread", "dilated", "groups-of-4", "5x5-strided"]
)
def test_what_is_not_finite_reaches_only_the_outputs_that_see_it(name, dtype, value):
    x, weight, _ = tensors(name, dtype)
    x[0, 5, 6, 6] = x[0, -1, -1, -1] = value
    actual = oracle.outputs_and_gradients(of(lk.conv2d, name), [x, weight])
    expected = oracle.outputs_and_gradients(of(reference.conv2d, name), [x.double(), weight.double()])
    for key, truth in expected.items():
        assert torch.equal(actual[key].isfinite(), truth.isfinite()), key
    assert not actual["output 0"].isfinite().all()


@pytest.mark.parametrize("scale", [1e-15, 1e12])
@pytest.mark.parametrize("name", EPILOGUE)
def test_magnitudes(name, scale):
    x, weight, _ = tensors(name)
    oracle.check(of(lk.conv2d, name), of(reference.conv2d, name), [x * scale, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "stride"),
    [((3, 83, 41, 43), 83, 1), ((2, 96, 28, 29), 96, 2), ((1, 960, 7, 7), 960, 1), ((2, 128, 28, 28), 32, 2)],
)
def test_same_bits_for_any_number_of_threads(shape, groups, stride, dtype):
    results = []
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1], shape[1] // groups, 3, 3).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            oracle.outputs_and_gradients(
                lambda x, w: lk.conv2d(x, w, None, stride, 1, 1, groups), [x, weight]
            )
        )
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_a_weight_gradient_over_many_pixels():
    """Sums of 50000 products: those of parts are added up, none is lost or taken twice."""
    x, weight, geometry = torch.randn(4, 17, 112, 113), torch.randn(17, 1, 3, 3), (None, 1, 1, 1, 17)
    oracle.check(
        lambda x, w: lk.conv2d(x, w, *geometry), lambda x, w: reference.conv2d(x, w, *geometry), [x, weight]
    )


@pytest.mark.parametrize("name", EPILOGUE)
def test_with_batch_norm_in_training(name):
    x, weight, _ = tensors(name)
    norm = [torch.rand(weight.shape[0]) + 0.5, torch.randn(weight.shape[0])]

    def normed(f):
        def run(x, w, norm_weight, norm_bias):
            z = f(x, w, None, *SHAPES[name][2:])
            return torch.nn.functional.batch_norm(z, None, None, norm_weight, norm_bias, training=True)

        return run

    def fused(x, w, norm_weight, norm_bias):
        return lk.conv2d_batch_norm(
            x, w, norm_weight, norm_bias, None, None, *SHAPES[name][2:], training=True
        )

    oracle.check(fused, normed(reference.conv2d), [x, weight, *norm])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*EPILOGUE, "7x7", "less-than-a-vector"])
def test_packed(name, dtype):
    x, weight, bias = tensors(name, dtype)
    packed = lk.PackedConv2d(weight, None, None, None, None, *SHAPES[name][2:], bias=bias, activation="relu")
    with torch.no_grad():
        whole = lk.conv2d(x, weight, bias, *SHAPES[name][2:], activation="relu")
        assert torch.equal(packed(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for name in ("pairs-and-a-rest", "5x5-strided", "groups-of-4", "groups-of-6", "multiplied-by-three"):
        oracle.check(of(lk.conv2d, name), of(reference.conv2d, name), tensors(name, dtype))
