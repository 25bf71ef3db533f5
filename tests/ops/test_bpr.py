"""bpr_: one pass over pairs, each against an item of its part that the user has not seen."""

import math
from collections import Counter

import pytest
import torch
from ops.blocks import rating_blocks

import lspm_kernels as lk
import oracle
from lspm_kernels.ops.bpr import _lists
from lspm_kernels.reference import bpr as reference


def problem(factors=16, users=30, items=40, count=300):
    tables = [0.3 * torch.randn(users, factors), 0.3 * torch.randn(items, factors), torch.randn(items)]
    return tables, torch.randint(users, (count,)), torch.randint(items, (count,))


def seen_by(users, items, count):
    """What each user has, as CSR."""
    pairs = torch.stack([users, items], 1).unique(dim=0)
    indptr = torch.zeros(count + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(pairs[:, 0], minlength=count).cumsum(0)
    return indptr, pairs[:, 1].int().contiguous()


def check(tables, blocks, seen=None, lr=0.05, reg=(0.1, 0.2, 0.3), seed=5):
    lists = _lists(blocks, *(seen or (None, None)), tables[0].shape[0])
    with_bias = len(tables) == 3

    def expected(*tables):
        tables = [t.clone() for t in tables]
        loss, _ = reference.bpr(
            *tables, *(() if with_bias else (None,)), blocks.users, blocks.items, *lists, lr=lr, reg=reg,
            seed=seed,
        )  # fmt: skip
        return *tables, loss.cpu()

    def ours(*tables):
        tables = [t.clone() for t in tables]
        loss, _ = lk.bpr_(
            *tables, *(() if with_bias else (None,)), blocks, seen=seen, lr=lr, reg=reg, seed=seed
        )
        return *tables, loss

    oracle.check(ours, expected, tables, gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("factors", [1, 7, 16, 33, 64, 128, 200])
@pytest.mark.parametrize("with_seen", [False, True])
def test_oracle(factors, with_seen):
    tables, users, items = problem(factors)
    blocks = rating_blocks(users, items, torch.ones(300), num_users=30, num_items=40)
    check(tables, blocks, seen_by(users, items, 30) if with_seen else None)


@pytest.mark.every_backend
@pytest.mark.parametrize("count", [0, 1, 9])
def test_few_pairs_and_no_bias(count):
    tables, users, items = problem(count=count)
    blocks = rating_blocks(users, items, torch.ones(count), num_users=30, num_items=40)
    check(tables, blocks)
    check(tables[:2], blocks)


def test_same_bits_for_any_number_of_threads():
    tables, users, items = problem(20, 300, 200, 20000)
    blocks = rating_blocks(users, items, torch.ones(20000))
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5, 2):
            torch.set_num_threads(n)
            copies = [t.clone() for t in tables]
            results.append([*copies, *lk.bpr_(*copies, blocks, seen=seen_by(users, items, 300), lr=0.1)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.every_backend
def test_items_are_drawn_evenly_from_the_part_and_never_what_is_seen():
    """Without factors that matter, a bias falls as often as its item is drawn."""
    count = 40000
    users, items = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    blocks = rating_blocks(users, items, torch.ones(count), num_users=1, num_items=21, grid=1)
    tables = torch.zeros(1, 1), torch.zeros(21, 1), torch.zeros(21)
    seen = torch.tensor([0, 3]), torch.tensor([0, 4, 7], dtype=torch.int32)
    _, skipped = lk.bpr_(*tables, blocks, seen=seen, lr=1e-6)
    drawn = tables[2] / -0.5e-6
    assert drawn[[4, 7]].tolist() == [0, 0]
    others = torch.cat([drawn[1:4], drawn[5:7], drawn[8:]])
    share = (count - int(skipped)) / 18
    assert (others - share).abs().max() < 5 * math.sqrt(share)
    assert int(skipped) < 5  # (3 / 21) ** 8 of them


@pytest.mark.every_backend
def test_a_user_who_has_seen_all_is_skipped():
    tables, users, items = problem(users=2, items=3, count=6)
    users = torch.zeros(6, dtype=torch.int64)
    before = [t.clone() for t in tables]
    seen = torch.tensor([0, 3, 3]), torch.tensor([0, 1, 2], dtype=torch.int32)
    loss, skipped = lk.bpr_(*tables, users, items, seen=seen, lr=0.1)
    assert (loss.item(), skipped.item()) == (0, 6)
    for a, b in zip(tables, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.every_backend
def test_of_few_items_others_are_drawn_too():
    """No more items than a square has parts otherwise, in each of which an item would be alone."""
    users, items = torch.arange(6).repeat(50), torch.arange(300) % 6
    tables, _, _ = problem(users=6, items=6)
    loss, skipped = lk.bpr_(*tables, users, items, seen=seen_by(users, items, 6), lr=0.01)
    assert loss > 0
    assert skipped < 3  # (1 / 6) ** 8 of them


def test_other_blocks_bring_other_items_together():
    _, users, items = problem(count=2000)
    together = Counter()
    for seed in range(6):
        blocks = rating_blocks(users, items, torch.ones(2000), num_users=30, num_items=40, seed=seed)
        for a, b in zip(blocks.part_offsets[:-1], blocks.part_offsets[1:], strict=True):
            part = blocks.part_items[a:b].tolist()
            together.update((x, y) for x in part for y in part if x < y)
    assert len(together) > 300  # of 780 pairs; one square has some 80


@pytest.mark.every_backend
def test_it_learns_what_users_like():
    """Users of two kinds, each with items of its own."""
    users = torch.randint(100, (8000,))
    items = torch.randint(40, (8000,)) * 2 + users % 2
    seen = seen_by(users, items, 100)
    tables = [0.1 * torch.randn(100, 8), 0.1 * torch.randn(80, 8), torch.zeros(80)]
    blocks = rating_blocks(users, items, torch.ones(8000), num_users=100, num_items=80)
    losses = [
        lk.bpr_(*tables, blocks, seen=seen, lr=0.05, reg=0.002, seed=e)[0].item() / 8000 for e in range(25)
    ]
    assert losses[0] > 0.5
    assert losses[-1] < 0.1
    scores = tables[0] @ tables[1].T + tables[2]
    own = torch.arange(80) % 2 == torch.arange(100)[:, None] % 2
    assert (scores[own].view(100, 40).mean(1) > scores[~own].view(100, 40).mean(1)).all()


P, Q, B = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(5)
PAIRS = torch.tensor([0, 3]), torch.tensor([4, 0])
BLOCKS = lk.rating_blocks(*PAIRS, torch.ones(2))
EMPTY = torch.zeros(5, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
MISUSES = {
    "user_factors must be a tensor of 2 dimensions, got": ((B, Q, B, *PAIRS), {}),
    "item_factors must be torch.float32 on cpu as user_factors is, got torch.float64 on cpu": (
        (P, Q.double(), B, *PAIRS),
        {},
    ),
    "user_factors must be contiguous": ((torch.ones(3, 4).T, Q, B, *PAIRS), {}),
    "user_factors and item_factors must have as many columns, 1 or more, got 3 and 2": (
        (P, torch.ones(5, 2), B, *PAIRS),
        {},
    ),
    "item_bias must have 5 elements, got 4": ((P, Q, B[:4], *PAIRS), {}),
    "reg must be a number or 3 numbers, got (0.1,)": ((P, Q, B, *PAIRS), {"reg": (0.1,)}),
    "reg must be finite and at least 0, got -1": ((P, Q, B, *PAIRS), {"reg": -1}),
    "lr must be positive, got 0": ((P, Q, B, *PAIRS), {"lr": 0}),
    "seed must be an integer from 0 to 2 ** 63 - 1, got -1": ((P, Q, B, *PAIRS), {"seed": -1}),
    "items must be a tensor, got NoneType": ((P, Q, B, PAIRS[0]), {}),
    "items must be None beside RatingBlocks": ((P, Q, B, BLOCKS, PAIRS[1]), {}),
    "item_factors must have the 5 rows that the RatingBlocks are of, got 4": ((P, Q[:4], B[:4], BLOCKS), {}),
    "users must be on user_factors' device cpu, got meta": ((P, Q, B, BLOCKS.to("meta")), {}),
    "seen[1] must be on user_factors' device cpu, got meta": (
        (P, Q, B, *PAIRS),
        {"seen": (EMPTY[0], EMPTY[1].to("meta"))},
    ),
    "seen must be two tensors, got int": ((P, Q, B, *PAIRS), {"seen": 3}),
    "seen[0] must be (5,) torch.int64, got (4,) torch.int64": (
        (P, Q, B, *PAIRS),
        {"seen": (EMPTY[0][:4], EMPTY[1])},
    ),
    "seen[1] must be a vector of torch.int32, got (0,) torch.int64": (
        (P, Q, B, *PAIRS),
        {"seen": (EMPTY[0], EMPTY[1].long())},
    ),
    "seen[1] must ascend among the items of a user, got 3 before 1": (
        (P, Q, B, *PAIRS),
        {"seen": (torch.tensor([0, 2, 2, 4, 4]), torch.tensor([2, 4, 3, 1], dtype=torch.int32))},
    ),
    "seen[0] must ascend from 0 to seen[1]'s 0 elements, got 0 to 2": (
        (P, Q, B, *PAIRS),
        {"seen": (torch.tensor([0, 1, 1, 2, 2]), EMPTY[1])},
    ),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse(message):
    arguments, options = MISUSES[message]
    with pytest.raises(ValueError) as error:
        lk.bpr_(*arguments, **({"lr": 0.1} | options))
    assert str(error.value).startswith(f"bpr_: {message}")


def test_opcheck():
    tables, users, items = problem()
    blocks = rating_blocks(users, items, torch.ones(300), num_users=30, num_items=40)
    of = blocks.users, blocks.items, blocks.offsets, blocks.part_items, blocks.part_offsets
    outputs = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    arguments = (*tables, *of, None, None, *outputs, [0.1, 0.0, 0.0, 0.0], 0, "cpu")
    torch.library.opcheck(torch.ops.lspm.bpr.default, arguments)
