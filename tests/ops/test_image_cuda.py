"""The CUDA kernels of max_pool2d, global_avg_pool and cross_entropy, executed on the CPU (tests/cuda_on_cpu).

Each runs as a row of its op's table, on copies of the tensors in emulated device memory.
"""

import ctypes
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, check_messages, fixture, run_tests_under_asan
from ops.test_cross_entropy import TARGETS, bound, targets
from ops.test_cross_entropy import check as check_loss

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import cross_entropy, global_avg_pool, max_pool2d
from lspm_kernels.reference import global_avg_pool as mean

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {F32: 0, BF16: 1, F16: 2}
OPS = {"max_pool2d": max_pool2d, "global_avg_pool": global_avg_pool, "cross_entropy": cross_entropy}
SOURCES = [
    path for op in OPS for path in (build.ROOT / f"csrc/cuda/{op}.cu", build.HERE / f"entries/{op}.cpp")
]

library = fixture(*SOURCES)


class Kernels:
    """The launchers of the three ops' rows, and where and how they run."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, False, (0, None)

    def call(self, name, inputs, outputs, shape):
        """Fills `outputs`, tensors or None, by a C entry."""
        copies = [self.library.copy(t, self.misaligned) for t in inputs]
        made = [t if t is None else self.library.empty(t.shape, t.dtype, self.misaligned) for t in outputs]
        self.library.call(name, *copies, *made, shape, *self.where)
        for to, buffer in zip(outputs, made, strict=True):
            if to is not None:
                to.copy_(buffer.tensor())

    def shape(self, op, *numbers):
        make = getattr(self.library.c, f"{op}_shape")
        make.restype = ctypes.c_void_p
        return ctypes.c_void_p(make(*numbers))

    def pool_shape(self, x, y, window):
        axes = [[x.shape[d], y.shape[d], *window[d - 1 :: 2]] for d in (1, 2)]
        sizes = (ctypes.c_int64 * 14)(x.shape[0], x.shape[3], *axes[0], *axes[1])
        return self.shape("max_pool2d", sizes, DTYPES[x.dtype])

    def max_pool2d_forward(self, x, y, positions, window):
        self.call("max_pool2d_forward", [x], [y, positions], self.pool_shape(x, y, window))

    def max_pool2d_backward(self, dy, positions, dx, window):
        self.call("max_pool2d_backward", [dy, positions], [dx], self.pool_shape(dx, dy, window))

    def mean_shape(self, x):
        N, H, W, C = map(ctypes.c_int64, x.shape)
        return self.shape("global_avg_pool", N, ctypes.c_int64(H.value * W.value), C, DTYPES[x.dtype])

    def global_avg_pool_forward(self, x, y):
        self.call("global_avg_pool_forward", [x], [y], self.mean_shape(x))

    def global_avg_pool_backward(self, dy, dx):
        self.call("global_avg_pool_backward", [dy], [dx], self.mean_shape(dx))

    def loss_shape(self, logits, target, ignore_index, reduction, smoothing):
        numbers = [ctypes.c_int64(n) for n in (*logits.shape, ignore_index)]
        flags = reduction, DTYPES[logits.dtype], int(target.is_floating_point())
        return self.shape("cross_entropy", *numbers, ctypes.c_float(smoothing), *flags)

    def cross_entropy_forward(self, logits, target, weight, loss, statistics, row_losses, *options):
        shape = self.loss_shape(logits, target, *options)
        outputs = [loss, statistics, row_losses]
        self.call("cross_entropy_forward", [logits, target, weight], outputs, shape)

    def cross_entropy_backward(self, dloss, logits, target, weight, statistics, dlogits, *options):
        shape = self.loss_shape(logits, target, *options)
        inputs = [dloss, logits, target, weight, statistics]
        self.call("cross_entropy_backward", inputs, [dlogits], shape)


@pytest.fixture
def kernels(library, monkeypatch):
    """The ops run these kernels, on CPU tensors."""
    kernels = Kernels(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    for name, op in OPS.items():
        row = next(row for row in op.BACKENDS if row.name == "cuda")
        here = dataclasses.replace(
            row,
            device="cpu",
            missing=lambda: None,
            forward=getattr(kernels, f"{name}_forward"),
            backward=getattr(kernels, f"{name}_backward"),
        )
        monkeypatch.setattr(op, "BACKENDS", (here,))
    return kernels


def pools(window, **options):
    """Our function and torch's, of x alone."""
    return [lambda x, f=f: f(x, *window, **options) for f in (lk.max_pool2d, F.max_pool2d)]


POOLS = {
    "vectors": ((2, 16, 7, 6), (3, 2, 1), F32),
    "single channels": ((2, 5, 7, 6), (3, 2, 1), BF16),
    "dilated, rows and columns apart": ((1, 8, 8, 9), ((3, 2), (2, 1), (1, 1), (2, 3)), F16),
    "a last window past the padding": ((1, 8, 5, 5), (3, 2, 1, 1, True), BF16),
    "more taps than a byte counts": ((1, 4, 18, 17), ((17, 16), 4, (8, 0)), F32),
    "no images": ((0, 4, 8, 8), (2,), F32),
}


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("case", POOLS)
def test_max_pool2d(kernels, case, misaligned):
    shape, window, dtype = POOLS[case]
    kernels.misaligned = misaligned
    x = torch.randn(shape).to(dtype)
    oracle.check(*pools(window), [x])
    x = torch.randint(3, shape).to(dtype)
    x[torch.rand(shape) < 0.1] = float("nan")
    ours, theirs = (f(x) for f in pools(window, return_indices=True))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lk.max_pool2d(x, *window), theirs[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 3, 5, 7), F32),
        ((1, 264, 4, 4), BF16),
        ((2, 136, 3, 1), F32),
        ((2, 16, 1, 1), F16),
        ((0, 3, 2, 2), F32),
    ],
)
def test_global_avg_pool(kernels, shape, dtype, misaligned):
    kernels.misaligned = misaligned
    oracle.check(lk.global_avg_pool, mean.global_avg_pool, [(torch.randn(shape) + 3).to(dtype)])


# kind of target, shape, dtype, reduction
LOSSES = [
    ("classes", (5, 7), F32, "mean"),
    ("weights", (2, 2056), BF16, "sum"),
    ("smoothed and weights", (3, 1000), BF16, "none"),
    ("smoothed", (2, 5, 3, 4), F32, "mean"),
    ("probabilities", (5, 24), F16, "mean"),
    ("probabilities, smoothed and weights", (2, 2050), F32, "sum"),
    ("nothing but smoothing", (9, 40), F16, "mean"),
]


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("kind, shape, dtype, reduction", LOSSES)
def test_cross_entropy(kernels, kind, shape, dtype, reduction, misaligned):
    kernels.misaligned = misaligned and dtype == F32  # statistics would not be aligned to a float
    probabilities, weights, smoothing = TARGETS[kind]
    logits = ((torch.randn(shape) + 2) * 3).to(dtype)
    target = targets(shape, dtype, probabilities, weights)
    check_loss(logits, *target, reduction=reduction, label_smoothing=smoothing)


def test_special_values_of_cross_entropy(kernels):
    for value in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(3, 600)
        logits[1, 3], logits[2, :598] = value, -float("inf")
        check_loss(logits, torch.tensor([5, 7, 599]), reduction="none")
    check_loss(torch.randn(2, 5), torch.tensor([-100, -100]), reduction="mean", gradients=False)
    check_loss(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64))
    check_loss(torch.randn(700, 2), torch.randint(2, (700,)))  # more rows than one step of the sum


def test_a_row_that_is_ignored_is_not_read_and_a_class_that_is_none_makes_nan(kernels):
    logits = torch.randn(4, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    loss = lk.cross_entropy(logits, torch.tensor([0, -100, 5, -1]), reduction="none")
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones(4))
    assert loss.isnan().tolist() == [False, False, True, True]
    assert gradient.isnan().all(1).tolist() == [False, False, True, True] and not gradient[1].any()
    for reduction in ("mean", "sum"):
        for wrong in (2**40, -(2**40)):
            assert lk.cross_entropy(logits[:1], torch.tensor([wrong]), reduction=reduction).isnan()


def test_same_bits_under_any_schedule(kernels):
    logits, images = torch.randn(9, 300).bfloat16(), torch.randn(2, 8, 7, 7)
    loss = bound(lk.cross_entropy, *targets((9, 300), weights=True), label_smoothing=0.1)
    results = []
    for seed in (0, 1, 5):
        kernels.library.configure(seed)
        found = oracle.outputs_and_gradients(loss, [logits])
        for name, op in (("max", pools((3, 1))[0]), ("mean", lk.global_avg_pool)):
            found |= {f"{name} {k}": v for k, v in oracle.outputs_and_gradients(op, [images]).items()}
        results.append(list(found.values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_launches_on_the_given_device_and_stream(kernels):
    kernels.where = 2, ctypes.c_void_p(0x1230)
    x = torch.randn(2, 8, 6, 6)
    for op in (
        pools((2,))[0],
        lk.global_avg_pool,
        lambda x: lk.cross_entropy(x[:, :, 0, 0], torch.arange(2)),
    ):
        oracle.outputs_and_gradients(op, [x])
        assert kernels.library.c.emu_last_device() == 2
        assert kernels.library.c.emu_last_stream() == 0x1230
        assert kernels.library.c.emu_current_device() == 0


def test_messages(kernels, monkeypatch):
    x = torch.randn(2, 8, 6, 6)
    calls = {
        "max_pool2d_forward": lambda: lk.max_pool2d(x, 2),
        "global_avg_pool_forward": lambda: lk.global_avg_pool(x),
        "cross_entropy_forward": lambda: lk.cross_entropy(x[:, :, 0, 0], torch.arange(2)),
    }
    check_messages(kernels, monkeypatch, DTYPES, calls, 3)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
