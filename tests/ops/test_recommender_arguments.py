"""What the ops of recommenders change lies in memory of its own; and their numbers may be NumPy's."""

import pytest
import torch

import lspm_kernels as lk

IDS, RATINGS = torch.tensor([0, 2, 1, 2]), torch.rand(4)
BAGS = torch.tensor([[0, 2], [1, 2]])


def ones(*sizes):
    return torch.ones(*sizes)


def shared(op):
    """A call of op for each pair of its tensors that could be one, with the message it ends in."""
    same, table = torch.ones(3), torch.ones(3, 3)
    pairs = {"lr": 0.1}
    if op is lk.mf_sgd_:
        of = (IDS, IDS, RATINGS)
        yield (
            "item_factors must lie apart from user_factors",
            lambda: op(table, table, None, None, *of, **pairs),
        )
        yield (
            "item_bias must lie apart from user_bias",
            lambda: op(ones(3, 3), table, same, same, *of, **pairs),
        )
        squares = {"squares": (same, same)}
        yield (
            r"squares\[1\] must lie apart from squares\[0\]",
            lambda: op(ones(3, 3), table, None, None, *of, **squares, **pairs),
        )
    elif op is lk.bpr_:
        yield (
            "item_factors must lie apart from user_factors",
            lambda: op(table, table, None, IDS, IDS, **pairs),
        )
        yield (
            "item_bias must lie apart from item_factors",
            lambda: op(ones(3, 3), table, table[0], IDS, IDS, **pairs),
        )
    else:
        moments = {"step": 1, **pairs}
        yield (
            "exp_avg_sq must lie apart from exp_avg",
            lambda: op(ones(3, 3), table, table, ones(2, 3), BAGS, **moments),
        )
        yield (
            "dout must lie apart from weight",
            lambda: op(table, ones(3, 3), ones(3, 3), table[1:], BAGS, **moments),
        )


@pytest.mark.parametrize("op", [lk.mf_sgd_, lk.bpr_, lk.embedding_bag_adam_], ids=["mf_sgd", "bpr", "adam"])
def test_tensors_that_are_one_are_refused(op):
    for message, call in shared(op):
        with pytest.raises(ValueError, match=f"^{op.__name__}: {message}, got memory of both$"):
            call()


def test_tables_side_by_side_are_taken():
    whole = torch.rand(7, 3)
    lk.mf_sgd_(whole[:3], whole[3:6], whole[6], None, IDS, IDS, RATINGS, lr=0.1)
    lk.embedding_bag_sgd_(whole[:3], whole[3:5], BAGS, lr=0.1)


def test_a_table_of_integers_is_told_what_it_should_be():
    whole = torch.ones(3, 3, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        lk.mf_sgd_(whole, whole, None, None, IDS, IDS, RATINGS, lr=0.1)
    rule = "user_factors must be of 2 dimensions and float32, got (3, 3) torch.int64"
    assert str(error.value) == f"mf_sgd_: {rule}"
    with pytest.raises(ValueError, match=r"^bpr_: users must be a vector of int32 or int64 on the CPU, got"):
        lk.bpr_(ones(3, 3), ones(3, 3), None, IDS.view(2, 2), IDS, lr=0.1)


def calls(number):
    """Ops with all their numbers by `number`, each with what it changes."""
    p, q, entries = ones(3, 3), ones(3, 3) / 2, (torch.tensor([0, 1, 2, 4]), IDS, RATINGS)
    of = (None, None, IDS, IDS, RATINGS)
    lk.mf_sgd_(p, q, *of, mean=number(0.5), lr=number(0.25), reg=(number(0.125),) * 4)
    lk.bpr_(p, q, None, IDS, IDS, lr=number(0.25), reg=number(0.5))
    lk.mf_als_(p, q, *entries, reg=number(0.5), implicit=True, alpha=number(2.0), weighted_reg=number(0.5))
    lk.nmf_(p.abs_(), q.abs_(), *entries, reg=number(0.5), eps=number(0.25))
    settings = {"lr": number(0.25), "weight_decay": number(0.5), "eps": number(0.5)}
    lk.embedding_bag_adam_(p, torch.zeros_like(p), torch.zeros_like(p), q[:2], BAGS, step=1, **settings)
    return p, q, lk.mf(p, q, IDS, IDS, mean=number(0.5))


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert all(map(torch.equal, calls(numpy.float32), calls(float)))


def test_the_default_dtype_is_of_no_consequence():
    blocks = lk.rating_blocks(IDS, IDS, RATINGS, seed=3)
    try:
        torch.set_default_dtype(torch.float64)
        p, q = (torch.rand(3, 3, dtype=torch.float32) for _ in range(2))
        loss, _ = lk.bpr_(p, q, None, IDS, IDS, lr=0.1)
        again = lk.rating_blocks(IDS, IDS, RATINGS, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    assert torch.equal(blocks.users, again.users) and torch.equal(blocks.offsets, again.offsets)
