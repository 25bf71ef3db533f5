"""The CUDA kernels of batch_norm_act, executed on the CPU (tests/cuda_on_cpu), against their reference."""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops.test_batch_norm_act import BF16, F16, F32, check, function, tensors

import lspm_kernels as lk
import oracle
from lspm_kernels import batch_norm, dispatch
from lspm_kernels.ops import batch_norm_act as ops

SOURCES = (build.ROOT / "csrc/cuda/batch_norm_act.cu", build.HERE / "entries/batch_norm_act.cpp")
# Of nvcc's PTX, whose translation takes its time.
PTX_KERNELS = r"(merge|sum_runs)_kernel|kernelI(fLi[14]|13__nv_bfloat16Li8|6__half?Li1)E"
DTYPES = {F32: 0, BF16: 1, F16: 2}

library = fixture(*SOURCES, ptx_kernels=PTX_KERNELS)


class Kernels:
    """The four kernels with the arguments of the bindings, on tensors of the CPU."""

    def __init__(self, library, misaligned=()):
        self.library, self.misaligned = library, misaligned

    def call(self, name, inputs, outputs, x, partials=0, eps=0.0, activation=0):
        library, channels = self.library, x.shape[-1]
        make = library.c.batch_norm_act_shape
        make.restype = ctypes.c_void_p
        sizes = [ctypes.c_int64(n) for n in (x.numel() // max(channels, 1), channels, partials)]
        shape = make(*sizes, DTYPES[x.dtype], activation, ctypes.c_float(eps))
        here = {n: n in self.misaligned for n in (*inputs, *outputs)}
        copies = [library.copy(t, misaligned=here[n]) for n, t in inputs.items()]
        rooms = [
            t if t is None else library.empty(t.shape, t.dtype, misaligned=here[n])
            for n, t in outputs.items()
        ]
        library.call(f"batch_norm_act_{name}", *copies, *rooms, ctypes.c_void_p(shape), 0, None)
        for room, t in zip(rooms, outputs.values(), strict=True):
            if t is not None:
                t.copy_(room.tensor())

    def statistics(self, x, partial, mean, variance):
        outputs = {"partial": partial, "mean": mean, "variance": variance}
        self.call("statistics", {"x": x}, outputs, x, partial.shape[0])

    def forward(self, x, residual, weight, bias, mean, variance, y, eps, activation, running):
        known = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
        inputs = {"x": x, "residual": residual, **known}
        self.call("forward", inputs, {"y": y}, x, eps=eps, activation=activation)

    def sums(self, dy, x, beside, weight, bias, mean, variance, dresidual, partial, sums, eps, activation):
        known = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
        inputs = {"dy": dy, "x": x, "beside": beside, **known}
        outputs = {"dresidual": dresidual, "partial": partial, "sums": sums}
        self.call("sums", inputs, outputs, x, partial.shape[0], eps, activation)

    def backward(self, dy, x, beside, weight, bias, mean, variance, sums, dx, eps, activation):
        known = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
        inputs = {"dy": dy, "x": x, "beside": beside, **known, "sums": sums}
        self.call("backward", inputs, {"dx": dx}, x, eps=eps, activation=activation)


@pytest.fixture
def kernels(library, monkeypatch):
    """The kernels, with the rows of the tables that say cuda calling them."""
    kernels = Kernels(library)
    row = next(row for row in ops.BACKENDS if row.name == "cuda")
    here = {"device": "cpu", "missing": lambda: None}
    row = dataclasses.replace(row, forward=kernels.forward, backward=kernels.backward, **here)
    reductions = dataclasses.replace(row, forward=kernels.statistics, backward=kernels.sums)
    monkeypatch.setattr(ops, "BACKENDS", (row,))
    monkeypatch.setattr(ops, "_REDUCTIONS", {"cuda": reductions})
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    monkeypatch.setattr(batch_norm, "_RUNS", {"cpu": 3})
    return kernels


# shape, dtype, activation, whether there is a residual, training
CASES = {
    "whole vectors": ((4, 64, 8, 8), F32, "relu", True, True),
    "rows that end a run early": ((3, 24, 15, 15), BF16, None, True, True),
    "several blocks of channels": ((2, 320, 5, 5), BF16, "silu", True, True),
    "one channel": ((3, 1, 7, 9), F16, "gelu", False, True),
    "three channels": ((2, 3, 31, 31), F32, "relu6", True, True),
    "two dimensions": ((9, 70), F32, "relu", False, True),
    "constants, by the output": ((2, 40, 5, 5), BF16, "relu", True, False),
    "constants, by x": ((2, 40, 5, 5), F32, "gelu", True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(kernels, name):
    shape, dtype, activation, residual, training = CASES[name]
    check(tensors(shape, dtype, residual=residual), activation=activation, training=training)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "gelu"])
def test_every_activation(kernels, activation):
    for residual in (True, False):
        check(tensors((2, 16, 5, 5), F32, residual=residual), activation=activation)


def test_what_may_be_absent(kernels):
    x, residual, weight, bias = tensors((2, 40, 5, 5))
    check([x, residual, None, bias], activation="relu")
    check([x, None, weight, None], activation="relu", training=False)
    check([x, None, None, None], running=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule(kernels, seed):
    kernels.library.configure(seed)
    check(tensors((3, 24, 9, 9), BF16), activation="relu")


NAMES = ["x", "residual", "y", "dy", "beside", "dresidual", "dx", "weight", "mean", "partial", "sums"]


@pytest.mark.parametrize("name", NAMES)
def test_misaligned_pointers(kernels, name):
    kernels.misaligned = (name,)
    check(tensors((2, 24, 5, 5), F32), activation="relu")


def test_a_large_mean_cancels_nothing(kernels):
    x, _, weight, bias = tensors((2, 20, 15, 15))
    check([x + 1000, None, weight, bias], gradients=False)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_special_values(kernels, value):
    x, _, weight, bias = tensors((2, 20, 7, 7))
    x[1, 7, 3, 3] = value
    check([x, None, weight, bias], gradients=False)


def test_same_bits_every_time(kernels):
    inputs, results = tensors((3, 24, 9, 9), BF16), []
    for seed in (0, 5):
        kernels.library.configure(seed)
        results.append(oracle.outputs_and_gradients(function(lk.batch_norm_act, True, "relu"), inputs))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_runs_of_any_lengths(kernels):
    x = torch.randn(90, 7) * 3 + 100
    runs = [*x.split([1, 50, 30, 9]), x[:0]]
    partial = torch.stack([
        torch.stack((torch.full((7,), len(r)), r.mean(0), ((r - r.mean(0)) ** 2).sum(0))).nan_to_num()
        for r in runs
    ])  # fmt: skip
    library = kernels.library
    mean, variance = (library.empty(7) for _ in range(2))
    make = library.c.batch_norm_act_shape
    make.restype = ctypes.c_void_p
    shape = make(*(ctypes.c_int64(n) for n in (0, 7, 5)), 0, 0, ctypes.c_float(0))
    library.call(
        "batch_norm_act_statistics",
        None,
        library.copy(partial),
        mean,
        variance,
        ctypes.c_void_p(shape),
        0,
        None,
    )
    torch.testing.assert_close(mean.tensor(), x.mean(0))
    torch.testing.assert_close(variance.tensor(), x.var(0, correction=0))


def test_messages(kernels):
    x, vector = torch.randn(6, 8), torch.ones(8)
    given = {"x": x, "residual": None, "weight": None, "bias": None, "mean": vector, "variance": vector}
    kernels.library.configure(shared_max=64)
    with pytest.raises(KernelError, match=r"^cudaLaunchKernelEx failed at batch_norm_act.cu:\d+: .*limit 64"):
        kernels.statistics(x, torch.empty(1, 3, 8), vector, vector)
    DTYPES[torch.int64] = 3
    with pytest.raises(KernelError, match=r"^batch_norm_act_forward: dtype must be f32, bf16 or f16, got 3$"):
        kernels.call("forward", given | {"x": x.long()}, {"y": x}, x.long())


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
