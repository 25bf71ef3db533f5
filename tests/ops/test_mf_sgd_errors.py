"""mf_sgd_: what it refuses, and in which words. Nothing changes then."""

import math

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

P, Q, BU, BI = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4), torch.zeros(5)
TABLES = P, Q, BU, BI
IDS = torch.tensor([0, 3]), torch.tensor([4, 0]), torch.tensor([1.0, 0.5])
BLOCKS = lk.rating_blocks(*IDS)


def but(place, value):
    return (*TABLES[:place], value, *TABLES[place + 1 :])


MISUSES = {
    "user_factors must be of 2 dimensions and float32, got (4,) torch.float32": ((*but(0, BU), *IDS), {}),
    "item_factors must be of 2 dimensions and float32, got (5, 3) torch.bfloat16": (
        (*but(1, Q.bfloat16()), *IDS),
        {},
    ),
    "user_factors and item_factors must have as many columns, got 3 and 2": (
        (*but(1, torch.ones(5, 2)), *IDS),
        {},
    ),
    "user_factors must have from 1 to 512 columns, got 513": (
        (torch.ones(4, 513), torch.ones(5, 513), None, None, *IDS),
        {},
    ),
    "user_factors must have from 1 to 512 columns, got 0": (
        (torch.ones(4, 0), torch.ones(5, 0), None, None, *IDS),
        {},
    ),
    "user_factors must be contiguous, as it changes in place, got strides (1, 4)": (
        (*but(0, torch.ones(3, 4).T), *IDS),
        {},
    ),
    "user_bias must have 4 elements, got 5": ((*but(2, BI), *IDS), {}),
    "item_bias must be a vector and float32, got (5,) torch.float64": ((*but(3, BI.double()), *IDS), {}),
    "squares[1] must have 5 elements, got 4": ((*TABLES, *IDS), {"squares": (BU, BU)}),
    "squares must be two tensors": ((*TABLES, *IDS), {"squares": BU}),
    "lr must be positive, got 0": ((*TABLES, *IDS), {"lr": 0}),
    "lr must be finite and at least 0, got -0.1": ((*TABLES, *IDS), {"lr": -0.1}),
    "lr must be finite and at least 0, got nan": ((*TABLES, *IDS), {"lr": math.nan}),
    "lr must be a number or 2 numbers, got (0.1, 0.1, 0.1)": ((*TABLES, *IDS), {"lr": (0.1, 0.1, 0.1)}),
    "reg must be finite and at least 0, got -1": ((*TABLES, *IDS), {"reg": -1}),
    "reg must be a number or 4 numbers, got (0.1, 0.1)": ((*TABLES, *IDS), {"reg": (0.1, 0.1)}),
    "l1 must be finite and at least 0, got inf": ((*TABLES, *IDS), {"l1": math.inf}),
    "mean must be finite, got nan": ((*TABLES, *IDS), {"mean": math.nan}),
    "loss must be one of squared, logistic, got 'hinge'": ((*TABLES, *IDS), {"loss": "hinge"}),
    "seed must be an integer from 0 to 2 ** 63 - 1, got -1": ((*TABLES, *IDS), {"seed": -1}),
    "items must be a tensor beside users, got NoneType": ((*TABLES, IDS[0]), {}),
    "items, ratings and weight must be None beside RatingBlocks": ((*TABLES, BLOCKS, IDS[1]), {}),
    "user_factors must have the 4 rows that the RatingBlocks are of, got 3": (
        (P[:3], Q, BU[:3], BI, BLOCKS),
        {},
    ),
    "ratings must be from 0 to 1 for a logistic loss, got 0 to 2": (
        (*TABLES, IDS[0], IDS[1], torch.tensor([0.0, 2.0])),
        {"loss": "logistic"},
    ),
    "users must be from 0 to 3, got 4": ((*TABLES, torch.tensor([0, 4]), *IDS[1:]), {}),
    "weight must be a vector of float32 on the CPU, got float": ((*TABLES, *IDS), {"weight": 1.0}),
    "backend must be one of cpu, triton, cuda, reference, got 'tpu'": ((*TABLES, *IDS), {"backend": "tpu"}),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse(message):
    arguments, options = MISUSES[message]
    with pytest.raises(ValueError) as error:
        lk.mf_sgd_(*arguments, **({"lr": 0.1} | options))
    assert str(error.value).removeprefix("mf_sgd_: ").removeprefix("mf_sgd: ").startswith(message)


def test_a_table_whose_gradient_is_recorded_is_refused():
    with pytest.raises(ValueError, match="mf_sgd_: what it changes must not require a gradient"):
        lk.mf_sgd_(P.clone().requires_grad_(), Q, BU, BI, *IDS, lr=0.1)


def test_the_kernel_leaves_alone_what_is_outside_its_tables():
    """What Python has checked, and what may have changed since, the kernel sees again."""
    tables, losses = [t.clone() for t in TABLES], torch.zeros(64)
    step = [0.0, 0.1, 0.1, *[0.0] * 6]
    users = BLOCKS.users.clone()
    users[0] = 2**31 - 1
    ratings = users, BLOCKS.items, BLOCKS.ratings, None, BLOCKS.offsets
    with pytest.raises(
        ValueError, match="users and items must be ids of rows of the tables, got 2147483647 and"
    ):
        compiled.cpu.mf_sgd_update(*tables, None, None, *ratings, losses, step, False, False, 0, 1)
    offsets = BLOCKS.offsets.clone()
    offsets[5] = 9
    ratings = BLOCKS.users, BLOCKS.items, BLOCKS.ratings, None, offsets
    with pytest.raises(ValueError, match="offsets must not decrease"):
        compiled.cpu.mf_sgd_update(*tables, None, None, *ratings, losses, step, False, False, 0, 1)
