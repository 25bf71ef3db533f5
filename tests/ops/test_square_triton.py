"""The Triton kernels of mf_sgd and bpr: what Triton compiles them to, executed on the CPU."""

import pytest
import torch
from ops import test_bpr, test_mf_sgd

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import bpr as bpr_op
from lspm_kernels.ops import mf_sgd as mf_sgd_op
from lspm_kernels.reference import bpr as bpr_reference

pytest.importorskip("triton", reason="triton is not installed")

from lspm_kernels.triton import bpr, mf_sgd

STEPS = {  # mean, lr, of biases, four L2, two L1; nonnegative, logistic, squares
    "plain": ([0.1, 0.05, 0.02, 0.1, 0.2, 0.3, 0.4, 0.0, 0.0], False, False, False),
    "all": ([0.1, 0.2, 0.2, 0.1, 0.2, 0.3, 0.4, 0.05, 0.1], True, True, True),
}
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


def pass_of(blocks, options, tables, bias=True):
    step, nonnegative, logistic, adaptive = STEPS[options]
    squares = [torch.full((t.shape[0],), 0.25) for t in tables[:2]] if adaptive else (None, None)
    tables = [t.clone() for t in tables]
    losses = torch.zeros(blocks.offsets.numel() - 1)
    of = blocks.users, blocks.items, blocks.ratings, blocks.weight, blocks.offsets, losses
    mf_sgd.update(*(tables if bias else [*tables, None, None]), *squares, *of, step, nonnegative, logistic, 3)
    return *tables, *(s for s in squares if s is not None), losses.sum()


@pytest.mark.parametrize("options", STEPS)
@pytest.mark.parametrize("factors", [7, 64])
def test_mf_sgd_against_the_reference(driver, factors, options):
    tables, ratings = test_mf_sgd.problem(factors, users=9, items=7, count=40, weight=options == "all")
    blocks = lk.rating_blocks(*ratings, num_users=9, num_items=7, grid=2)
    step, nonnegative, logistic, adaptive = STEPS[options]

    def expected(*tables):
        squares = [torch.full_like(t[:, 0], 0.25) for t in tables[:2]] if adaptive else None
        return test_mf_sgd.expected(
            tables, blocks, squares, mean=step[0], lr=tuple(step[1:3]), reg=tuple(step[3:7]),
            l1=tuple(step[7:]), nonnegative=nonnegative, loss="logistic" if logistic else "squared",
        )  # fmt: skip

    oracle.check(lambda *t: pass_of(blocks, options, t), expected, tables, gradients=False)
    assert driver.launches == ["_mf_sgd_kernel"] * 2


@on_one_gpu
def test_mf_sgd_rounds_as_the_cpu_does(driver):
    """No row comes twice, so sums differ by little: few bfloat16 fall to the other side."""
    tables, _ = test_mf_sgd.problem(64, users=12, items=12)
    tables[:2] = [t.bfloat16() for t in tables[:2]]
    blocks = lk.rating_blocks(torch.randperm(12), torch.randperm(12), torch.rand(12), grid=2)
    theirs = [t.clone() for t in tables]
    step, *_ = STEPS["plain"]
    lk.mf_sgd_(*theirs, blocks, mean=step[0], lr=tuple(step[1:3]), reg=tuple(step[3:7]), seed=3)
    found = pass_of(blocks, "plain", tables)
    moved = [(a != b).float().mean() for a, b in zip(found[:2], tables[:2], strict=True)]
    assert min(moved) > 0.3
    for a, b in zip(found[:2], theirs[:2], strict=True):
        assert (a != b).float().mean() < 0.01


@on_one_gpu
def test_without_biases_and_of_ids_outside(driver):
    tables, ratings = test_mf_sgd.problem(16, users=6, items=5, count=12)
    blocks = lk.rating_blocks(*ratings, num_users=6, num_items=5, grid=1)
    blocks.users[3], blocks.items[5] = -1, 5
    kept = torch.tensor([n not in (3, 5) for n in range(12)])
    found = pass_of(blocks, "plain", tables[:2], bias=False)
    fewer = [t[kept] for t in (blocks.users, blocks.items, blocks.ratings)]
    losses = torch.zeros(1)
    theirs = [t.clone() for t in tables[:2]]
    step, *_ = STEPS["plain"]
    none = None, None, None, None
    mf_sgd.update(*theirs, *none, *fewer, None, torch.tensor([0, 10]), losses, step, False, False, 3)
    for a, b in zip(found, (*theirs, losses.sum()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_seen", [False, True])
def test_bpr_against_the_reference(driver, with_seen):
    tables, users, items = test_bpr.problem(20, users=9, items=12, count=40)
    blocks = lk.rating_blocks(users, items, torch.ones(40), num_users=9, num_items=12, grid=2)
    seen = test_bpr.seen_by(users, items, 9) if with_seen else (None, None)
    lists = bpr_op._lists(blocks, *seen, 9)
    skips = []

    def expected(*tables):
        tables = [t.clone() for t in tables]
        loss, skipped = bpr_reference.bpr(
            *tables, blocks.users, blocks.items, *lists, lr=0.1, reg=(0.1, 0.2, 0.3), seed=2
        )
        skips.append(skipped)
        return *tables, loss

    def ours(*tables):
        tables, losses = [t.clone() for t in tables], torch.zeros(4)
        skipped = torch.zeros(4, dtype=torch.int32)
        of = blocks.users, blocks.items, blocks.offsets, blocks.part_items, blocks.part_offsets, *seen
        bpr.update(*tables, *of, losses, skipped, [0.1, 0.1, 0.2, 0.3], 2)
        skips.append(int(skipped.sum()))
        return *tables, losses.sum()

    oracle.check(ours, expected, tables, gradients=False)
    assert len(set(skips)) == 1
    assert driver.launches == ["_bpr_kernel"] * 2


@pytest.mark.parametrize("op", [mf_sgd_op, bpr_op])
def test_the_table_needs_a_gpu(op):
    name = op.__name__.rsplit(".", 1)[1]
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(NotImplementedError, match=f"{name}: triton needs a tensor on cuda"):
        dispatch.pick(name, op.BACKENDS, "triton", torch.ones(1))
