"""The Triton kernels of linear_cross_entropy, executed on the CPU as a row of the op's table."""

import dataclasses

import pytest
import torch
from ops.test_linear_cross_entropy import KINDS, check, made, ours, small_blocks

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import linear_cross_entropy as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import uninitialised

__all__ = ["small_blocks"]  # the fixture
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Where the code generators differ little, one suffices.
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def row_on_the_cpu(monkeypatch):
    """The op runs its Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "triton")

    def forward(logits, target, weight, kept, losses, *options):
        for output in (kept, losses):  # what is a part, or read from the second block on, comes with values
            if output.nbytes == output.untyped_storage().nbytes() and options[0] == 0:
                uninitialised(output)
        row.forward(logits, target, weight, kept, losses, *options)

    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=forward)
    monkeypatch.setattr(ops, "BACKENDS", (here,))


@pytest.mark.parametrize("kind, dtype, reduction", [("everything", F32, "none"), ("smoothed", BF16, "mean")])
def test_against_the_reference(driver, kind, dtype, reduction):
    tensors, options = made((5, 4, 70), kind, dtype)
    check(tensors, {"reduction": reduction, **options})
    assert driver.launches == ["_forward_kernel", "_backward_kernel"]


def check_blocks(kind, dtype, reduction):
    tensors, options = made((20, 4, 40), kind, dtype)
    check(tensors, {"reduction": reduction, **options})


@on_one_gpu
@pytest.mark.parametrize(
    "kind, dtype", [("everything", F32), ("smoothed and weighted", BF16), ("z_loss", F16)]
)
def test_in_blocks(driver, kind, dtype, small_blocks):
    check_blocks(kind, dtype, "mean")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_in_blocks_of_every_kind(driver, kind, small_blocks):
    for dtype, reduction in ((F32, "mean"), (BF16, "mean"), (F16, "none")):
        check_blocks(kind, dtype, reduction)


@on_one_gpu
@pytest.mark.parametrize("kind", ["smoothed and weighted", "capped"])
def test_rows_of_several_tiles(driver, kind):
    tensors, options = made((3, 2, 5000), kind)
    check(tensors, {"reduction": "none", **options})


@on_one_gpu
def test_special_values(driver, small_blocks):
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors, options = made((9, 4, 50), "bias")
        tensors[2][20] = value
        check(tensors, {"reduction": "none", **options}, gradients=False)
    tensors[2][:20] = -float("inf")  # a block of its own too
    check(tensors, {**options, "target": options["target"].clamp(min=21), "reduction": "none"})


@on_one_gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_class_that_is_none_reads_nothing_and_makes_nan(driver, dtype):
    (hidden, weight, bias), options = made((5, 4, 9), "bias", dtype)
    options["target"] = torch.tensor([0, 9, -1, -100, 2**40])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    losses = ours(*leaves, **options, reduction="none")
    assert losses.isnan().tolist() == [False, True, True, False, True]
    assert ours(*leaves, **options).isnan()
    gradient = torch.autograd.grad(losses, leaves, torch.ones(5))[0]
    assert gradient.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not gradient[3].any() and not losses[3]


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    tensors, options = made((7, 4, 90), "everything", BF16)
    results = []
    for driver.seed in range(3):
        results.append(list(oracle.outputs_and_gradients(lambda *t: ours(*t, **options), tensors).values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


@on_one_gpu
def test_nothing_to_do(driver):
    (hidden, weight, _), options = made((1, 4, 7))
    loss = lk.linear_cross_entropy(hidden[:0], weight, options["target"][:0], reduction="sum")
    assert loss == 0 and not driver.launches


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype in (F32, BF16, F16):
            for classes in (30, 900, 5000):
                for kind in ("plain", "everything"):
                    tensors, options = made((9, 8, classes), kind, dtype)
                    leaves = [t if t is None else t.requires_grad_() for t in tensors]
                    found = ours(*leaves, **options)
                    sum(y.sum() for y in (found if isinstance(found, tuple) else (found,))).backward()
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
