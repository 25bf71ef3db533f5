"""cross_entropy: the public function, under every instruction set."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled, dispatch
from lspm_kernels.ops import cross_entropy as ops
from lspm_kernels.reference import cross_entropy as reference

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (70, 10), (5, 1000), (2, 3001), (6,), (2, 5, 3, 4), (33, 3, 2)]
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
# What stands besides the logits: probabilities in place of classes, weights, label_smoothing.
TARGETS = {
    "classes": (False, False, 0.0),
    "weights": (False, True, 0.0),
    "smoothed": (False, False, 0.1),
    "smoothed and weights": (False, True, 0.3),
    "nothing but smoothing": (False, True, 1.0),
    "probabilities": (True, False, 0.0),
    "probabilities, smoothed and weights": (True, True, 0.2),
}


def classes_of(shape):
    return shape[1 if len(shape) > 1 else 0]


def targets(shape, dtype=F32, probabilities=False, weights=False, ignored=True):
    """A target and a weight for logits of a shape."""
    classes = classes_of(shape)
    weight = torch.rand(classes) + 0.1 if weights else None
    if probabilities:
        return torch.randn(shape).softmax(1 if len(shape) > 1 else 0).to(dtype), weight
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if ignored and target.numel() > 1:
        target.view(-1)[1] = -100
    return target, weight


def bound(function, target, weight=None, view=lambda x: x, **options):
    """function of the logits alone; target and weight in float64 where they are."""

    def of_logits(x):
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in (target, weight)]
        given = wide if x.dtype == torch.float64 else (target, weight)
        return function(view(x), *given, **options)

    return of_logits


def check(logits, target, weight=None, ours=lk.cross_entropy, view=lambda x: x, gradients=True, **options):
    forms = (bound(f, target, weight, view, **options) for f in (ours, reference.cross_entropy))
    oracle.check(*forms, [logits], gradients=gradients)


def check_kind(kind, shape, dtype=F32, scale=1.0, **options):
    probabilities, weights, smoothing = TARGETS[kind]
    logits = ((torch.randn(shape) + 2) * scale).to(dtype)
    check(logits, *targets(shape, dtype, probabilities, weights), label_smoothing=smoothing, **options)


@pytest.mark.every_backend
@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", TARGETS)
def test_against_the_reference(kind, shape, dtype, reduction):
    check_kind(kind, shape, dtype, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for kind in TARGETS:
        for shape in ((70, 10), (3, 1029), (2, 37, 3)):
            check_kind(kind, shape, dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1000.0])
def test_magnitudes(kind, scale):
    check_kind(kind, (9, 1100), scale=scale, reduction="sum")


@pytest.mark.every_backend
@REDUCTIONS
@pytest.mark.parametrize("where", [0, 1024, 2049])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(value, where, reduction):
    target, _ = targets((4, 2050), ignored=False)
    logits = torch.randn(4, 2050)
    logits[2, where] = value
    check(logits, target, reduction=reduction)
    check(logits, target, label_smoothing=0.1, reduction=reduction, gradients=False)


@pytest.mark.every_backend
def test_logits_that_are_all_infinite_up_to_the_last():
    logits = torch.full((3, 2050), -float("inf"))
    logits[0, -1] = logits[1, 5] = 3.0
    target = torch.tensor([2049, 5, 7])
    check(logits, target, reduction="none")


@pytest.mark.every_backend
def test_logits_far_below_0():
    check(torch.randn(3, 7) - 300, torch.tensor([0, 6, 3]))


@pytest.mark.every_backend
def test_torchs_own_defaults_and_classes_of_32_bits():
    logits, (target, weight) = torch.randn(6, 5), targets((6, 5), weights=True)
    torch.testing.assert_close(
        lk.cross_entropy(logits, target, weight), F.cross_entropy(logits, target, weight)
    )
    assert torch.equal(lk.cross_entropy(logits, target.int()), lk.cross_entropy(logits, target))
    wide = lk.cross_entropy(logits.half(), target, weight)
    assert wide.dtype == F16  # beside weights of float32


@pytest.mark.every_backend
@REDUCTIONS
def test_all_ignored(reduction):
    logits = torch.randn(3, 5, requires_grad=True)
    loss = lk.cross_entropy(logits, torch.full((3,), 4), ignore_index=4, reduction=reduction)
    expected = F.cross_entropy(logits, torch.full((3,), 4), ignore_index=4, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not gradient.any()


@pytest.mark.every_backend
def test_a_row_that_is_ignored_is_not_read():
    logits = torch.randn(3, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    loss = lk.cross_entropy(logits, torch.tensor([0, -100, 4]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and not gradient[1].any() and gradient[0].any()


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 2)])
@REDUCTIONS
def test_no_rows(shape, reduction):
    check(torch.randn(shape), targets(shape)[0], reduction=reduction)
    check(torch.randn(shape), torch.rand(shape), reduction=reduction)


VIEWS = {
    "channels_last": ((2, 7, 3, 4), lambda x: x.contiguous(memory_format=torch.channels_last), False),
    "images": ((2, 7, 3, 4), lambda x: x, True),
    "transposed": ((7, 6), lambda x: x.t(), True),
    "every other class": ((6, 14), lambda x: x[:, ::2], True),
    "misaligned": ((6, 15), lambda x: x[:, 1:], True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory(name):
    size, view, copied = VIEWS[name]
    logits = torch.randn(size)
    target, _ = targets(tuple(view(logits).shape))
    check(logits, target, view=view)
    given = view(logits)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        lk.cross_entropy(given, target)
    assert ("aten::copy_" in {event.key for event in profile.events()}) == copied


@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, reduction):
    logits = torch.randn(1003, 77).to(dtype)
    function = bound(lk.cross_entropy, *targets((1003, 77), weights=True), reduction=reduction)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(oracle.outputs_and_gradients(function, [logits]))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("number", [1, 2])
def test_a_target_or_weight_with_a_gradient_is_left_to_the_reference(number, monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    logits, *others = torch.randn(4, 3), *targets((4, 3), probabilities=True, weights=True)
    others[number - 1].requires_grad_()
    with pytest.warns(
        lk.FallbackWarning, match="cross_entropy: cpu needs target and weight without a gradient"
    ):
        loss = lk.cross_entropy(logits, *others)
    expected = torch.autograd.grad(F.cross_entropy(logits, *others), others[number - 1])
    assert torch.equal(*torch.autograd.grad(loss, others[number - 1]), *expected)
    with torch.no_grad():
        torch.testing.assert_close(lk.cross_entropy(logits, *others, backend="cpu"), loss)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("wrong", [10, 17, -1, -99, 2**40, -(2**40)])
def test_a_class_that_is_none(wrong, backend):
    target = torch.randint(10, (3000,))
    target[[1100, 2999]] = torch.tensor([wrong, 11])  # of several the first is named
    with pytest.raises(ValueError) as error:
        lk.cross_entropy(torch.randn(3000, 10, requires_grad=True), target, backend=backend)
    assert str(error.value) == f"cross_entropy: target must be from 0 to 9 or -100, got {wrong}"


X, T = torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)
LOGITS = "logits must be a floating-point tensor (N, C), (C,) or (N, C, ...) of one class or more"
SHAPED = "target must be classes of shape (4,) or probabilities of shape (4, 5)"
BAD = {
    f"{LOGITS}, got list": (([1.0], T), {}),
    f"{LOGITS}, got () torch.float32": ((torch.ones(()), T), {}),
    f"{LOGITS}, got (4, 5) torch.int64": ((X.long(), T), {}),
    f"{LOGITS}, got (4, 0) torch.float32": ((X[:, :0], T), {}),
    f"{SHAPED}, got (3,)": ((X, T[:3]), {}),
    f"{SHAPED}, got list": ((X, [0]), {}),
    "target must have dtype torch.int64 or torch.int32, got torch.float32": ((X, T.float()), {}),
    "target must have logits' dtype torch.float32, got torch.int64": ((X, X.long()), {}),
    "target must have logits' dtype torch.float32, got torch.float16": ((X, X.half()), {}),
    "target must be on logits' device cpu, got meta": ((X, T.to("meta")), {}),
    "weight must be a tensor of shape (5,), got (4,)": ((X, T, torch.ones(4)), {}),
    "weight must have dtype torch.float32, got torch.float16": ((X, T, torch.ones(5).half()), {}),
    "ignore_index must be an integer of 64 bits, got 1.5": ((X, T), {"ignore_index": 1.5}),
    "ignore_index must be below 0 beside probabilities, got 3": ((X, X), {"ignore_index": 3}),
    "reduction must be one of none, mean, sum, got 'average'": ((X, T), {"reduction": "average"}),
    "reduction must be one of none, mean, sum, got {}": ((X, T), {"reduction": {}}),
    f"ignore_index must be an integer of 64 bits, got {2**63}": ((X, T), {"ignore_index": 2**63}),
    "label_smoothing must be from 0 to 1, got 1.5": ((X, T), {"label_smoothing": 1.5}),
    "label_smoothing must be from 0 to 1, got '0.1'": ((X, T), {"label_smoothing": "0.1"}),
    "label_smoothing must be from 0 to 1, got nan": ((X, T), {"label_smoothing": float("nan")}),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    given, options = BAD[message]
    with pytest.raises(ValueError) as error:
        lk.cross_entropy(*given, **options, backend=backend)
    assert str(error.value) == f"cross_entropy: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    loss, statistics = torch.empty(()), torch.empty(13)
    forward = partial(compiled.cpu.cross_entropy_forward, row_losses=None, ignore_index=-100, threads=1)
    forward = partial(forward, smoothing=0.0)
    for message, wrong in {
        "logits must have 2 dimensions": (X[0], T, None, loss, statistics, 1),
        "logits must be contiguous": (torch.ones(5, 4).t(), T, None, loss, statistics, 1),
        "target must have another number of elements": (X, T[:3], None, loss, statistics, 1),
        "target must have the dtype": (X, X.half(), None, loss, statistics, 1),
        "weight must have another number of elements": (X, T, X[0, :4], loss, statistics, 1),
        "loss must have another number of elements": (X, T, None, loss, statistics, 0),
        "statistics must have another number of elements": (X, T, None, loss, statistics[:12], 1),
        "reduction must be 0, 1 or 2": (X, T, None, loss, statistics, 3),
    }.items():
        names = ("logits", "target", "weight", "loss", "statistics", "reduction")
        with pytest.raises(ValueError, match=message):
            forward(**dict(zip(names, wrong, strict=True)))


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="cross_entropy: triton needs a tensor on cuda, got cpu"):
        lk.cross_entropy(X, T, backend="triton")
    with pytest.warns(
        lk.FallbackWarning, match="cross_entropy: cpu needs dtype float32, bfloat16, float16, got"
    ):
        lk.cross_entropy(X.double(), T)
