"""The Triton kernels of max_pool2d, global_avg_pool and cross_entropy, executed on the CPU.

Each is run as a row of its op's table, so what an op hands to its kernels is tested too.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ops.test_cross_entropy import TARGETS, bound, targets
from ops.test_cross_entropy import check as check_loss

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import cross_entropy, global_avg_pool, max_pool2d
from lspm_kernels.reference import global_avg_pool as mean

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import unwritten

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAST = torch.channels_last
# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


OUTPUTS = {max_pool2d: ((1, 2), (2,)), global_avg_pool: ((1,), (1,)), cross_entropy: ((3, 4, 5), (5,))}


@pytest.fixture(autouse=True)
def rows_on_the_cpu(monkeypatch):
    """The ops run their Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    for op, (forward, backward) in OUTPUTS.items():
        row = next(row for row in op.BACKENDS if row.name == "triton")
        here = dataclasses.replace(
            row,
            device="cpu",
            missing=lambda: None,
            forward=unwritten(row.forward, forward),
            backward=unwritten(row.backward, backward),
        )
        monkeypatch.setattr(op, "BACKENDS", (here,))


# shape, then the window, ceil_mode and dtype
POOLS = {
    "the stem of a ResNet": ((2, 17, 9, 8), (3, 2, 1), False, BF16),
    "dilated, rows and columns apart": ((1, 5, 11, 12), ((3, 2), (2, 1), (1, 1), (2, 3)), False, F32),
    "a last window past the padding": ((1, 130, 5, 5), (3, 2, 1), True, F16),
    "more taps than a byte counts": ((1, 3, 18, 17), ((17, 16), 2, (8, 0)), False, F32),
}


@pytest.mark.parametrize("case", POOLS)
def test_max_pool2d(driver, case):
    shape, window, ceil_mode, dtype = POOLS[case]
    ours, theirs = (
        lambda x, f=f: f(x, *window, ceil_mode=ceil_mode, return_indices=True)[0]
        for f in (lk.max_pool2d, F.max_pool2d)
    )
    oracle.check(ours, theirs, [torch.randn(shape).to(dtype)])
    x = torch.randint(3, shape).to(dtype)
    x[torch.rand(shape) < 0.1] = float("nan")
    for found, expected in zip(
        lk.max_pool2d(x, *window, ceil_mode=ceil_mode, return_indices=True),
        F.max_pool2d(x, *window, ceil_mode=ceil_mode, return_indices=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert driver.launches == ["_forward_kernel", "_backward_kernel", "_forward_kernel"]


@on_one_gpu
def test_max_pool2d_without_positions(driver):
    x = torch.full((1, 3, 5, 5), -float("inf"))
    assert torch.equal(lk.max_pool2d(x, 2), F.max_pool2d(x, 2))
    assert lk.max_pool2d(x[:0], 2).shape == (0, 3, 2, 2)
    assert driver.launches == ["_forward_kernel"]


@pytest.mark.parametrize(
    "shape, dtype", [((2, 3, 5, 7), F32), ((1, 200, 4, 4), BF16), ((2, 17, 1, 1), F16), ((0, 3, 2, 2), F32)]
)
def test_global_avg_pool(driver, shape, dtype):
    oracle.check(lk.global_avg_pool, mean.global_avg_pool, [(torch.randn(shape) + 3).to(dtype)])


# kind of target, shape, dtype, reduction
LOSSES = [
    ("classes", (5, 7), F32, "mean"),
    ("weights", (2, 5000), BF16, "sum"),
    ("smoothed and weights", (3, 1000), BF16, "none"),
    ("smoothed", (2, 5, 3, 4), F32, "mean"),
    ("probabilities", (5, 7), F16, "mean"),
    ("probabilities, smoothed and weights", (2, 5000), F32, "sum"),
]


@pytest.mark.parametrize("kind, shape, dtype, reduction", LOSSES)
def test_cross_entropy(driver, kind, shape, dtype, reduction):
    probabilities, weights, smoothing = TARGETS[kind]
    logits = ((torch.randn(shape) + 2) * 3).to(dtype)
    logits[1:, -1] += 20  # the largest in the last block, but for the first sample
    target = targets(shape, dtype, probabilities, weights)
    check_loss(logits, *target, reduction=reduction, label_smoothing=smoothing)
    summed = ["_sum_kernel"] * (reduction != "none")
    assert driver.launches == ["_forward_kernel", *summed, "_backward_kernel"]


@on_one_gpu
def test_special_values_of_cross_entropy(driver):
    for value in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(3, 5000)
        logits[1, 3], logits[2, :4500] = value, -float("inf")
        check_loss(logits, torch.tensor([5, 7, 4999]), reduction="none")
    check_loss(torch.randn(2, 5), torch.tensor([-100, -100]), reduction="mean", gradients=False)
    check_loss(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64))


@on_one_gpu
def test_a_row_that_is_ignored_is_not_read_and_a_class_that_is_none_makes_nan(driver):
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


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    logits, images = torch.randn(9, 1500).bfloat16(), torch.randn(2, 7, 9, 9)
    loss = bound(lk.cross_entropy, *targets((9, 1500), weights=True), label_smoothing=0.1)
    results = []
    for driver.seed in range(3):
        found = oracle.outputs_and_gradients(loss, [logits])
        for op in (lambda x: lk.max_pool2d(x, 3, 1), lk.global_avg_pool):
            found |= {f"{op} {k}": v for k, v in oracle.outputs_and_gradients(op, [images]).items()}
        results.append(list(found.values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype in (F32, BF16):
            for channels in (20, 64, 512):
                x = torch.randn(2, channels, 9, 9).to(dtype).requires_grad_()
                lk.max_pool2d(x, 3, 2, 1).sum().backward()
                lk.global_avg_pool(x).sum().backward()
            for classes in (21, 1000, 50257):
                logits = torch.randn(2, classes).to(dtype).requires_grad_()
                for probabilities, smoothing in ((False, 0.0), (False, 0.1), (True, 0.1)):
                    target = targets((2, classes), dtype, probabilities, smoothing > 0)
                    lk.cross_entropy(logits, *target, label_smoothing=smoothing).backward()
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
