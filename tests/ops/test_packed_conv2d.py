"""PackedConv2d: a convolution whose weight is laid out once."""

import copy
import pickle
import re

import pytest
import torch
from test_conv2d import DTYPES, SHAPES, tensors

import lspm_kernels as lk
from lspm_kernels import packed_conv2d


def made(name="3x3", dtype=torch.float32, **options):
    """A PackedConv2d, an x for it, and a residual."""
    x, weight, bias = tensors(name, dtype, bias=True)
    filters = len(weight)
    norm = torch.rand(filters) + 0.5, torch.randn(filters), torch.randn(filters), torch.rand(filters) + 0.5
    packed = lk.PackedConv2d(weight, *norm, *SHAPES[name][2:], bias=bias, **options)
    with torch.no_grad():
        return packed, x, torch.randn_like(packed(x))


def expected(packed, x, residual=None):
    weight, bias, *norm = packed.tensors
    options = {"bias": bias, "activation": packed.activation, "residual": residual, "eps": packed.eps}
    return lk.conv2d_batch_norm(x, weight, *norm, *packed.window, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_same_bits_as_conv2d_batch_norm(name, dtype):
    packed, x, residual = made(name, dtype, activation="relu")
    assert torch.equal(packed(x, residual), expected(packed, x, residual))
    assert torch.equal(packed(x[:1]), expected(packed, x[:1]))


@torch.no_grad()
def test_images_of_another_size():
    packed, x, _ = made("3x3-grouped")
    larger = torch.randn(1, x.shape[1], 30, 17)
    assert torch.equal(packed(larger), expected(packed, larger))


@torch.no_grad()
def test_without_a_norm():
    x, weight, bias = tensors(bias=True)
    assert torch.equal(lk.PackedConv2d(weight, bias=bias)(x), lk.conv2d(x, weight, bias))
    assert torch.equal(lk.PackedConv2d(weight, activation="gelu")(x), lk.conv2d(x, weight, activation="gelu"))


@pytest.mark.parametrize("index", range(6))
@torch.no_grad()
def test_a_changed_tensor_is_seen(index):
    packed, x, _ = made()
    before = packed(x)
    packed.tensors[index].mul_(1.5)
    assert torch.equal(packed(x), expected(packed, x))
    assert not torch.equal(packed(x), before)
    packed.tensors[index].data = packed.tensors[index] * 0.5
    assert torch.equal(packed(x), expected(packed, x))


@torch.no_grad()
def test_weights_are_packed_once(monkeypatch):
    packed, x, _ = made()
    calls = []
    monkeypatch.setattr(lk.PackedConv2d, "_pack", lambda *args: calls.append(args))
    packed(x)
    assert not calls
    packed.tensors[0].add_(1)
    packed(x)
    assert len(calls) == 1


@torch.no_grad()
def test_copies_and_pickles_pack_anew():
    packed, x, _ = made()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other._packed is None
        assert torch.equal(other(x), packed(x))
        other.tensors[0].zero_()
        assert not torch.equal(other(x), packed(x))


@torch.no_grad()
def test_what_is_not_finite_reaches_only_the_outputs_that_see_it():
    packed, x, _ = made()
    x[1, 5, 4, 4] = float("inf")
    y = packed(x)
    assert not y[1, :, 3:6, 3:6].isfinite().any() and int((~y.isfinite()).sum()) == 9 * y.shape[1]


@torch.no_grad()
def test_autocast_traces_and_inference_tensors():
    packed, x, residual = made(activation="relu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x, residual), expected(packed, x, residual))
    traced = torch.compile(lambda x: packed(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x), packed(x) * 2)
    with torch.inference_mode():
        weight = packed.tensors[0].clone()
        assert torch.equal(lk.PackedConv2d(weight)(x), lk.conv2d(x, weight))


@torch.no_grad()
def test_same_bits_for_any_number_of_threads():
    packed, x, _ = made("3x3-many-channels")
    threads, before = torch.get_num_threads(), packed(x)
    try:
        torch.set_num_threads(1)
        assert torch.equal(copy.deepcopy(packed)(x), before)
    finally:
        torch.set_num_threads(threads)


def test_the_operator():
    packed, x, residual = made(activation="relu")
    shape, window = packed(x.detach()).shape, (1, 1, 1, 1, 1, 1, 1)
    weight, *epilogue = packed.tensors[0], *packed._epilogue
    args = x, weight, packed._packed, *epilogue, residual, list(shape[2:]), window, 1, "cpu"
    torch.library.opcheck(torch.ops.lspm.packed_conv2d.default, args)


WRONG = {
    "weight must be a tensor (K, C / groups, R, S) of float32, bfloat16 or float16, got (3, 4)": (
        lambda: lk.PackedConv2d(torch.ones(3, 4))
    ),
    "running_mean must be there where norm_weight or norm_bias is, got None": (
        lambda: lk.PackedConv2d(torch.ones(3, 4, 1, 1), torch.ones(3))
    ),
    "bias must be a tensor of shape (3,), got (4,)": (
        lambda: lk.PackedConv2d(torch.ones(3, 4, 1, 1), bias=torch.ones(4))
    ),
    "activation must be one of None, relu, relu6, silu, gelu, got 'tanh'": (
        lambda: lk.PackedConv2d(torch.ones(3, 4, 1, 1), activation="tanh")
    ),
    "running_mean and running_var must be given together, got running_mean alone": (
        lambda: lk.PackedConv2d(torch.ones(3, 4, 1, 1), running_mean=torch.zeros(3))
    ),
    "eps must be finite and at least 0, got -1.0": (
        lambda: lk.PackedConv2d(torch.ones(3, 4, 1, 1), eps=-1.0)
    ),
    "x must have four dimensions, (N, C, H, W), got (64, 9, 9)": lambda: made()[0](torch.ones(64, 9, 9)),
    "x must need no gradient, got one that does: use conv2d_batch_norm": (
        lambda: made()[0](torch.ones(1, 64, 9, 9, requires_grad=True))
    ),
    "x must have weight's 64 channels times groups 1, got 63": lambda: made()[0](torch.ones(1, 63, 9, 9)),
    "weight must have x's dtype torch.bfloat16, got torch.float32": (
        lambda: made()[0](torch.ones(1, 64, 9, 9, dtype=torch.bfloat16))
    ),
    "residual must be a tensor of y's shape (1, 40, 9, 9), got (1, 40, 9, 8)": (
        lambda: made()[0](torch.ones(1, 64, 9, 9), torch.ones(1, 40, 9, 8))
    ),
    "running_var must be finite and not negative, got -1.000000 in channel 2": (
        lambda: lk.PackedConv2d(
            torch.ones(3, 4, 1, 1),
            running_mean=torch.zeros(3),
            running_var=torch.tensor([1.0, 1.0, -1.0]),
        )(torch.ones(1, 4, 2, 2))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    with pytest.raises(ValueError, match=re.escape(f"PackedConv2d: {message}") + "$"):
        WRONG[message]()


@torch.no_grad()
def test_the_kernel_refuses_weights_packed_for_another_window():
    packed, x, _ = made()
    packed._packed = packed._packed[:-64]
    with pytest.raises(ValueError, match=r"^packed must have another number of elements$"):
        packed(x)


def test_every_instruction_set(isa):
    with torch.no_grad():
        for name in ("3x3", "1x1", "7x7-stem", "3x3-grouped"):
            packed, x, residual = made(name, activation="relu")
            assert torch.equal(packed(x, residual), expected(packed, x, residual))


def test_it_has_no_gradient():
    with pytest.raises(NotImplementedError, match=r"^PackedConv2d: has no gradient$"):
        packed_conv2d.BACKENDS[0].backward()
