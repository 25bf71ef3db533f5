"""batch_norm_act: the public function against its reference, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import batch_norm_act as ops
from lspm_kernels.reference import batch_norm_act as reference

F32, BF16, F16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
ACTIVATIONS = list(reference.ACTIVATIONS)
# Few channels and many, multiples of vectors and not, rows that fill no line, two dimensions to five.
SHAPES = [(3, 2, 5, 7), (9, 10), (4, 3, 50), (3, 64, 7, 7), (2, 100, 4, 3), (2, 1000, 3), (2, 32, 3, 4, 5)]


def tensors(shape, dtype=F32, weight_dtype=F32, residual=True):
    """x, residual, weight, bias, as they lie in a convolutional network."""
    x, other = torch.randn(2, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[1]).to(weight_dtype)
    return [ops.batch_norm.channels_last(x), other if residual else None, weight, bias]


def function(f, training=True, activation=None, running=True, **options):
    """f of x, residual, weight, bias; with running statistics of its own."""

    def call(x, residual, weight, bias):
        mean = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        variance = mean.flip(0).clone()
        given = (mean, variance) if running else (None, None)
        return f(
            x, weight, bias, *given, residual=residual, activation=activation, training=training, **options
        )

    return call


def check(inputs, gradients=True, **options):
    ours, theirs = function(lk.batch_norm_act, **options), function(reference.batch_norm_act, **options)
    oracle.check(ours, theirs, inputs, gradients=gradients)


@pytest.mark.every_backend
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype, activation, training):
    for residual in (True, False):
        check(tensors(shape, dtype, residual=residual), training=training, activation=activation)


@pytest.mark.every_backend
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_what_may_be_absent(training):
    x, residual, weight, bias = tensors((3, 40, 5, 5))
    for given in ([x, None, weight, None], [x, None, None, bias], [x, residual, None, None]):
        for activation in (None, "relu"):
            check(given, training=training, activation=activation)
    check([x, residual, weight, bias], training=False, running=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_weights(dtype):
    check(tensors((3, 40, 5, 5), dtype, dtype), activation="silu")


@pytest.mark.every_backend
def test_a_residual_of_another_dtype():
    x, residual, weight, bias = tensors((3, 40, 5, 5), BF16)
    y = lk.batch_norm_act(x, weight, bias, residual=residual.float(), training=True)
    assert y.dtype == F32
    torch.testing.assert_close(y, F.batch_norm(x.float(), None, None, weight, bias, True) + residual)


@pytest.mark.every_backend
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_one_gradient_alone(activation, training, wanted):
    found = []
    for f in (lk.batch_norm_act, reference.batch_norm_act):
        inputs = tensors((3, 40, 5, 5))
        inputs[wanted].requires_grad_()
        torch.manual_seed(1)
        y = function(f, training, activation)(*inputs)
        found.append(torch.autograd.grad(y.pow(3).sum(), inputs[wanted])[0])
        torch.manual_seed(0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.every_backend
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_layouts(training):
    x, residual, weight, bias = torch.randn(3, 40, 6, 5), torch.randn(6, 5, 3, 40), *torch.randn(2, 80)
    turned = lambda f: lambda x, r, w, b: f(x, r.permute(2, 3, 0, 1), w[::2], b[::2])  # noqa: E731
    forms = [function(f, training, "relu") for f in (lk.batch_norm_act, reference.batch_norm_act)]
    oracle.check(*map(turned, forms), [x, residual, weight, bias])
    y = lk.batch_norm_act(x, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    lies_so = x.contiguous(memory_format=torch.channels_last)
    assert ops.batch_norm.channels_last(lies_so) is lies_so


@pytest.mark.every_backend
def test_misaligned_data():
    flat = torch.randn(2, 4 * 64 + 1)
    inputs = [flat[0, 1:].view(4, 64), flat[1, 1:].view(4, 64), *torch.randn(2, 65)[:, 1:]]
    assert all(t.data_ptr() % 16 for t in inputs)
    check(inputs, activation="relu")


@pytest.mark.every_backend
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e15])
def test_magnitudes(scale):
    x, residual, weight, bias = tensors((3, 40, 5, 5))
    check([x * scale, residual, weight, bias], gradients=False)


@pytest.mark.every_backend
def test_a_large_mean_cancels_nothing():
    x, _, weight, bias = tensors((16, 20, 9, 9))
    check([x + 1000, None, weight, bias], gradients=False)
    running = torch.zeros(20), torch.ones(20)
    lk.batch_norm_act(x + 1000, None, None, *running, training=True, momentum=1.0)
    torch.testing.assert_close(running[1], (x + 1000).double().var((0, 2, 3)).float(), rtol=3e-6, atol=0)


@pytest.mark.every_backend
def test_an_outlier_among_the_first_rows():
    x, _, weight, bias = tensors((4, 5, 9, 9))
    x[0, :, 0, 0] = 1e4
    check([x, None, weight, bias], gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(value):
    x, _, weight, bias = tensors((4, 40, 5, 5))
    x[2, 17, 1, 1] = value
    y = lk.batch_norm_act(x, weight, bias, training=True)
    assert torch.equal(y.isnan(), F.batch_norm(x, None, None, weight, bias, True).isnan())
    assert y[:, 17].isnan().all() and y.isnan().sum() == 100
    check([x, None, weight, bias], activation="relu", training=False, gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(dtype, momentum):
    for shape in [(8, 3, 9, 9), (4, 600, 5, 5), (2, 7)]:
        x = ops.batch_norm.channels_last((torch.randn(shape) * 3 + 1).to(dtype))
        running = torch.rand(2, shape[1]).to(dtype)
        ours, torchs = running.clone().unbind(), running.float().unbind()
        versions = [t._version for t in ours]
        lk.batch_norm_act(x, None, None, *ours, training=True, momentum=momentum)
        F.batch_norm(x.float(), *torchs, training=True, momentum=momentum)
        for a, b, version in zip(ours, torchs, versions, strict=True):
            torch.testing.assert_close(a, b.to(dtype))
            assert a._version > version
        before = [t.clone() for t in ours]
        lk.batch_norm_act(x, None, None, *ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.every_backend
def test_as_torch_has_it():
    x, residual, weight, bias = tensors((3, 40, 5, 5))
    running = torch.rand(2, 40).unbind()
    expected = F.relu(F.batch_norm(x, *running, weight, bias) + residual)
    y = lk.batch_norm_act(x, weight, bias, *running, residual=residual, activation="relu")
    torch.testing.assert_close(y, expected)


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    check(tensors(shape), activation="relu", training=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 113, 97), (9, 64, 33, 31), (3, 1000, 7, 7)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        call = function(lk.batch_norm_act, True, "relu")
        results.append(oracle.outputs_and_gradients(call, tensors(shape, dtype)))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for activation in ACTIVATIONS:
        for shape in [(3, 20, 7, 7), (2, 513, 5)]:
            check(tensors(shape, dtype), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, width", [(16, 250), (64, 63), (10, 401)])
def test_outputs_that_are_streamed(channels, width, dtype):
    """They have the bits of smaller ones, which stay in the cache."""
    call = function(lk.batch_norm_act, False, "relu")
    inputs = tensors((4, channels, width, 150), dtype)  # more than 4 MiB in float32
    if dtype != F32:
        inputs = [t.repeat(2, 1, 1, 1) if t.dim() == 4 else t for t in inputs]
    whole = oracle.outputs_and_gradients(call, inputs)
    dy = oracle._weights(whole["output 0"])
    parts = [[t[i : i + 1] if t.dim() == 4 else t for t in inputs] for i in range(len(inputs[0]))]
    for i, part in enumerate(parts):
        x, residual = (t.requires_grad_() for t in part[:2])
        y = call(x, residual, *part[2:])
        dx, dresidual = torch.autograd.grad(y, (x, residual), dy[i : i + 1])
        for name, t in (("output 0", y), ("gradient 0", dx), ("gradient 1", dresidual)):
            assert torch.equal(whole[name][i : i + 1], t), name


def test_partials_that_another_kernel_has_filled():
    x = torch.randn(90, 7) * 3 + 100
    runs = [part for part in x.split([1, 50, 30, 9])] + [x[:0]]
    partial = torch.stack([
        torch.stack((torch.full((7,), len(r)), r.mean(0), ((r - r.mean(0)) ** 2).sum(0))).nan_to_num()
        for r in map(torch.Tensor.float, runs)
    ])  # fmt: skip
    mean, variance = torch.empty(2, 7)
    compiled.cpu.batch_norm_act_statistics(None, partial, mean, variance, 1)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0, correction=0))


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="batch_norm_act: triton needs a tensor on cuda, got cpu"):
        lk.batch_norm_act(torch.ones(2, 4), training=True, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="batch_norm_act: cpu needs dtype .*, got float64"):
        lk.batch_norm_act(torch.ones(2, 4, dtype=torch.float64), training=True)
