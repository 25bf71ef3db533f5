"""conv2d_batch_norm: training and evaluation, as torch.nn.Conv2d and torch.nn.BatchNorm2d together."""

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import conv2d_batch_norm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# x, weight, stride, padding, dilation, groups
SHAPES = {
    "1x1": ((3, 32, 6, 7), (40, 32, 1, 1), 1, 0, 1, 1),
    "3x3": ((2, 20, 9, 8), (36, 20, 3, 3), 1, 1, 1, 1),
    "strided": ((2, 17, 9, 8), (16, 17, 3, 3), 2, 1, 1, 1),
    "stem": ((2, 3, 20, 18), (16, 3, 7, 7), 2, 3, 1, 1),
    "grouped": ((4, 32, 5, 5), (48, 8, 3, 3), 1, 1, 1, 4),
    "many-rows": ((3, 16, 70, 80), (8, 16, 1, 1), 1, 0, 1, 1),
}


def tensors(name="3x3", dtype=torch.float32, residual=False):
    """x, weight, norm_weight, norm_bias, running_mean, running_var, residual."""
    x, weight, stride, padding, dilation, groups = SHAPES[name]
    K = weight[0]
    x = torch.randn(x).to(dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(weight) / torch.Size(weight[1:]).numel() ** 0.5).to(dtype)
    y = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups)
    beside = torch.randn_like(y).to(dtype) if residual else None
    return [x, weight, torch.rand(K) + 0.5, torch.randn(K), torch.randn(K) / 4, torch.rand(K) + 0.5, beside]


def both(name, **options):
    """Our function and the reference; running statistics are cloned, as a call in training changes them."""

    def of(f):
        def function(x, w, nw, nb, mean, variance, residual=None):
            running = (mean.detach().clone(), variance.detach().clone())
            y = f(x, w, nw, nb, *running, *SHAPES[name][2:], residual=residual, **options)
            return y, *running

        return function

    return of(lk.conv2d_batch_norm), of(reference.conv2d_batch_norm)


@pytest.mark.every_backend
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, dtype, training):
    given = tensors(name, dtype)
    oracle.check(*both(name, training=training, activation="relu"), given, gradients=False)
    leaves = [
        lambda x, w, nw, nb, f=f: f(x, w, nw, nb, *given[4:6])[0] for f in both(name, training=training)
    ]
    oracle.check(*leaves, given[:4])


@pytest.mark.every_backend
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", None])
@pytest.mark.parametrize("training", [True, False])
def test_residual_and_activation(activation, training):
    given = tensors("strided", residual=True)
    forms = both("strided", training=training, activation=activation)
    oracle.check(*forms, given, gradients=False)
    leaves = [lambda x, w, nw, nb, r, f=f: f(x, w, nw, nb, *given[4:6], r)[0] for f in forms]
    oracle.check(*leaves, [*given[:4], given[6]])


@pytest.mark.every_backend
def test_against_modules_over_steps():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.BatchNorm2d(16)
    ours = torch.nn.BatchNorm2d(16)
    for _ in range(3):
        x = torch.randn(4, 8, 6, 6) + 2
        expected = F.relu(norm(conv(x)))
        y = lk.conv2d_batch_norm(
            x, conv.weight, ours.weight, ours.bias, ours.running_mean, ours.running_var, padding=1,
            bias=conv.bias, activation="relu", training=True,
        )  # fmt: skip
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, norm.running_mean)
    torch.testing.assert_close(ours.running_var, norm.running_var)
    with torch.no_grad():
        y = lk.conv2d_batch_norm(
            x, conv.weight, ours.weight, ours.bias, ours.running_mean, ours.running_var, padding=1,
            bias=conv.bias,
        )  # fmt: skip
        torch.testing.assert_close(y, norm.eval()(conv(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.every_backend
def test_a_large_mean_cancels_nothing():
    given = tensors("many-rows")
    given[0] = given[0] * 0.01 + 100
    oracle.check(*both("many-rows", training=True), given, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_same_bits_for_any_number_of_threads(dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        given = tensors("many-rows", dtype)
        f = both("many-rows", training=True)[0]
        results.append(oracle.outputs_and_gradients(lambda *t, f=f, g=given: f(*t, *g[4:6])[0], given[:4]))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_every_instruction_set(isa):
    for name in ("1x1", "stem"):
        for dtype in DTYPES:
            forms = both(name, training=True, activation="relu")
            oracle.check(*forms, tensors(name, dtype), gradients=False)


@pytest.mark.every_backend
def test_compile():
    torch._dynamo.reset()
    given = tensors()
    ours, theirs = both("3x3", training=True, activation="relu")
    oracle.check(torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs, given, gradients=False)


X, W = torch.ones(2, 8, 7, 6), torch.ones(16, 8, 3, 3)
BAD = {
    "conv2d_batch_norm: x must have four dimensions, (N, C, H, W), got (8, 7, 6)": ((X[0], W), {}),
    "conv2d_batch_norm: x must have weight's 4 channels times groups 1, got 8": ((X, W[:, :4]), {}),
    "conv2d_batch_norm: bias must be a tensor of shape (16,), got (8,)": ((X, W), {"bias": torch.ones(8)}),
    "conv2d_batch_norm: the convolution's output must have more than one value per channel to take statistics"
    " of, got (1, 16, 1, 1)": ((X[:1, :, :3, :3], W), {"training": True}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    args, options = BAD[message]
    with pytest.raises(ValueError) as error:
        lk.conv2d_batch_norm(*args, **options)
    assert str(error.value) == message


def test_running_statistics_that_are_not_finite():
    broken = torch.tensor([1.0] * 15 + [float("nan")])
    with pytest.raises(ValueError, match="conv2d_batch_norm: running_var must"):
        lk.conv2d_batch_norm(X, W, None, None, torch.zeros(16), broken)


@pytest.mark.parametrize("present", [True, False])
def test_folded_weights_are_the_two_in_one(present):
    x, weight, norm_weight, norm_bias, mean, variance, _ = tensors("grouped")
    bias = torch.randn(48)
    if not present:
        bias = norm_weight = norm_bias = None
    folded = lk.fold_batch_norm(weight, bias, norm_weight, norm_bias, mean, variance, 1e-3)

    def truth(x):
        z = F.conv2d(x, weight.to(x), None if bias is None else bias.to(x), 1, 1, 1, 4)
        known = [t if t is None else t.to(x) for t in (mean, variance, norm_weight, norm_bias)]
        return F.batch_norm(z, *known, False, 0.1, 1e-3)

    expected = truth(x.double())
    torch.testing.assert_close(
        F.conv2d(x.double(), *[t.double() for t in folded], 1, 1, 1, 4), expected, rtol=1e-5, atol=1e-6
    )
    assert folded[0].dtype == folded[1].dtype == torch.float32


@pytest.mark.parametrize("name", ["norm_weight", "norm_bias"])
def test_bad_parameters_of_the_norm_are_named(name):
    with pytest.raises(ValueError, match=rf"^conv2d_batch_norm: {name} must be a tensor of shape \(16,\)"):
        lk.conv2d_batch_norm(X, W, **{name: torch.ones(3)}, training=True)


def test_folding_refuses_what_is_no_statistic():
    with pytest.raises(ValueError, match=r"fold_batch_norm: running_var must"):
        lk.fold_batch_norm(W, None, None, None, torch.zeros(16), torch.full((16,), float("inf")))
    with pytest.raises(ValueError, match=r"fold_batch_norm: running_mean must be a tensor of shape \(16,\)"):
        lk.fold_batch_norm(W, None, None, None, torch.zeros(8), torch.ones(16))
    with pytest.raises(ValueError, match=r"fold_batch_norm: running_mean must be a tensor \(16,\), got None"):
        lk.fold_batch_norm(W, None, None, None, None, None)
    with pytest.raises(ValueError, match=r"fold_batch_norm: .* given together, got running_mean alone"):
        lk.fold_batch_norm(W, None, None, None, torch.zeros(16), None)
    with pytest.raises(ValueError, match=r"fold_batch_norm: eps must be finite and at least 0, got -0.5"):
        lk.fold_batch_norm(W, None, None, None, torch.zeros(16), torch.ones(16), -0.5)
