"""rating_blocks: every rating once, in blocks that have no row in common."""

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels.rating_blocks import parts_on_gpu


def drawn(count=5000, users=300, items=90):
    """Ratings of which a few users and items have most."""
    ids = [(n * torch.rand(count) ** 2).long() for n in (users, items)]
    return *ids, torch.rand(count), torch.rand(count)


@pytest.mark.parametrize("grid", [1, 3, 8, 200, None])
def test_blocks_of_a_step_share_no_row(grid):
    blocks = lk.rating_blocks(*drawn(), grid=grid)
    side = round((blocks.offsets.numel() - 1) ** 0.5)
    assert side == (grid or 8)
    parts = {}, {}
    for b in range(side * side):
        here = slice(blocks.offsets[b], blocks.offsets[b + 1])
        user, item = b % side, (b % side + b // side) % side
        for part, ids, where in zip(parts, (user, item), (blocks.users, blocks.items), strict=True):
            for row in where[here].tolist():
                assert part.setdefault(row, ids) == ids
    sizes = blocks.offsets.diff()
    assert sizes.sum() == 5000
    if grid == 8:
        assert sizes.view(8, 8).sum(0).max() < 5000 / 8 * 1.02  # of users of one part


def test_parts_are_few_on_a_cpu_and_more_on_a_gpu():
    blocks = lk.rating_blocks(*drawn(), num_users=400_000, num_items=20_000)
    assert blocks.offsets.numel() == 8 * 8 + 1
    sizes = (40, 30), (30_000, 10_000), (400_000, 20_000)
    assert [parts_on_gpu(*size) for size in sizes] == [8, 19, 64]


def test_every_rating_once_with_its_weight():
    given = drawn()
    blocks = lk.rating_blocks(*given)

    def rows(users, items, ratings, weight):
        return sorted(zip(users.tolist(), items.tolist(), ratings.tolist(), weight.tolist(), strict=True))

    assert rows(*given) == rows(blocks.users, blocks.items, blocks.ratings, blocks.weight)


def test_a_block_is_dealt_from_eight_hands_sorted_by_user():
    users, items, ratings, _ = drawn(count=203)
    blocks = lk.rating_blocks(users, items, ratings, grid=1)
    hands = [blocks.users[hand::8] for hand in range(8)]
    assert torch.equal(torch.cat(hands).long(), users.sort().values)
    order = users.sort(stable=True).indices  # ratings of a user stay in their order
    assert torch.equal(torch.cat([blocks.ratings[hand::8] for hand in range(8)]), ratings[order])


def test_it_writes_to_what_it_is_given(tmp_path):
    given = drawn()
    names = (
        ("users", torch.int32),
        ("items", torch.int32),
        ("ratings", torch.float32),
        ("weight", torch.float32),
    )
    out = tuple(
        torch.from_file(str(tmp_path / name), shared=True, size=5000, dtype=dtype) for name, dtype in names
    )
    blocks = lk.rating_blocks(*given, out=out)
    plain = lk.rating_blocks(*given)
    for name, dtype in names:
        mapped = torch.from_file(str(tmp_path / name), size=5000, dtype=dtype)
        assert torch.equal(mapped, getattr(plain, name))
        assert torch.equal(getattr(blocks, name), mapped)


def test_an_empty_list_and_one_rating():
    none = torch.empty(0)
    blocks = lk.rating_blocks(none.long(), none.long(), none)
    assert len(blocks) == 0
    assert (blocks.num_users, blocks.num_items) == (0, 0)
    one = lk.rating_blocks(torch.tensor([4]), torch.tensor([2]), torch.tensor([3.5]))
    assert (one.users.tolist(), one.items.tolist(), one.ratings.tolist()) == ([4], [2], [3.5])
    assert (one.num_users, one.num_items) == (5, 3)


USERS, ITEMS, RATINGS = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([1.0, 2.0])
MISUSES = {
    "users must be from 0 to 2147483646, got -1": ((torch.tensor([0, -1]), ITEMS, RATINGS), {}),
    "users must be from 0 to 0, got 1": ((USERS, ITEMS, RATINGS), {"num_users": 1}),
    "items must be from 0 to 4, got 7": ((USERS, torch.tensor([1, 7]), RATINGS), {"num_items": 5}),
    "users must be a vector of int32 or int64 on the CPU, got (2,) torch.float32 on cpu": (
        (RATINGS, ITEMS, RATINGS),
        {},
    ),
    "items must be a vector of int32 or int64 on the CPU, got list": ((USERS, [1, 0], RATINGS), {}),
    "ratings must be a vector of float32 on the CPU, got (2, 1) torch.float32 on cpu": (
        (USERS, ITEMS, RATINGS[:, None]),
        {},
    ),
    "ratings must be a vector of float32 on the CPU, got (2,) torch.int64 on cpu": (
        (USERS, ITEMS, USERS),
        {},
    ),
    "items must have 2 elements, got 1": ((USERS, ITEMS[:1], RATINGS), {}),
    "ratings must be a vector of float32 on the CPU, got NoneType": ((USERS, ITEMS, None), {}),
    "num_users must be an integer from 0 to 2 ** 63 - 1, got 'x'": (
        (USERS, ITEMS, RATINGS),
        {"num_users": "x"},
    ),
    "out must be tensors for users, items, ratings and weight, got int": (
        (USERS, ITEMS, RATINGS),
        {"out": 3},
    ),
    "ratings must be finite, got nan": ((USERS, ITEMS, torch.tensor([1.0, float("nan")])), {}),
    "weight must be finite, got inf": ((USERS, ITEMS, RATINGS, torch.tensor([1.0, float("inf")])), {}),
    "weight must be at least 0, got -1.0": ((USERS, ITEMS, RATINGS, torch.tensor([1.0, -1.0])), {}),
    "seed must be an integer from 0 to 2 ** 63 - 1, got -1": ((USERS, ITEMS, RATINGS), {"seed": -1}),
    "grid must be an integer from 1 to 256, got 0": ((USERS, ITEMS, RATINGS), {"grid": 0}),
    "grid must be an integer from 1 to 256, got 257": ((USERS, ITEMS, RATINGS), {"grid": 257}),
    "out must be contiguous, int32 and float32 as users and items, ratings and weight are, and as long": (
        (USERS, ITEMS, RATINGS),
        {"out": (USERS[:1].int(), ITEMS.int(), RATINGS, None)},
    ),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse(message):
    arguments, options = MISUSES[message]
    with pytest.raises(ValueError) as error:
        lk.rating_blocks(*arguments, **options)
    assert str(error.value).startswith(f"rating_blocks: {message}")
