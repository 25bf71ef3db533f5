"""What mf_als_, mf_als_loss and nmf_ refuse, and in which words."""

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

NAN, INF = float("nan"), float("inf")


def given(**changes):
    """Arguments that every one of the functions takes, but for the changes."""
    arguments = {
        "factors": torch.ones(3, 2),
        "other_factors": torch.ones(4, 2),
        "indptr": torch.tensor([0, 2, 2, 3]),
        "indices": torch.tensor([0, 3, 1]),
        "values": torch.ones(3),
        "reg": 1.0,
    }
    return arguments | changes


# Of all three, by the message; the value that is shown stands at its end.
COMMON = {
    "factors must be a tensor (rows, K) with K of at least 1, got (3,)": {"factors": torch.ones(3)},
    "factors must be a tensor (rows, K) with K of at least 1, got list": {"factors": [1.0]},
    "other_factors must be a tensor (rows, K) with K of at least 1, got (4, 2, 1)": {
        "other_factors": torch.ones(4, 2, 1)
    },
    "factors must be a tensor (rows, K) with K of at least 1, got (3, 0)": {"factors": torch.ones(3, 0)},
    "factors must have dtype torch.float32 or torch.float64, got torch.float16": {
        "factors": torch.ones(3, 2).half()
    },
    "other_factors must have factors' K 2, got 5": {"other_factors": torch.ones(4, 5)},
    "other_factors must have factors' dtype torch.float32, got torch.float64": {
        "other_factors": torch.ones(4, 2).double()
    },
    "other_factors must be on factors' device cpu, got meta": {
        "other_factors": torch.ones(4, 2, device="meta")
    },
    "indptr must be a tensor of shape (4,), got (3,)": {"indptr": torch.tensor([0, 2, 3])},
    "indptr must be a tensor of shape (4,), got list": {"indptr": [0, 2, 2, 3]},
    "indptr must have dtype torch.int64, got torch.int32": {"indptr": torch.tensor([0, 2, 2, 3]).int()},
    "indptr must be on factors' device cpu, got meta": {
        "indptr": torch.ones(4, dtype=torch.int64, device="meta")
    },
    "indptr must go from 0 to 3, got 1 to 3": {"indptr": torch.tensor([1, 2, 2, 3])},
    "indptr must go from 0 to 3, got 0 to 4": {"indptr": torch.tensor([0, 2, 2, 4])},
    "indptr must not decrease, got [2, 1] at 1": {"indptr": torch.tensor([0, 2, 1, 3])},
    "indices must be a tensor of one dimension, got (3, 1)": {"indices": torch.ones(3, 1).long()},
    "indices must have dtype torch.int32 or torch.int64, got torch.float32": {"indices": torch.ones(3)},
    "indices must be on factors' device cpu, got meta": {"indices": torch.ones(3, device="meta").long()},
    "indices must be from 0 to 3, got 4": {"indices": torch.tensor([0, 4, 1])},
    "indices must be from 0 to 3, got -1": {"indices": torch.tensor([0, -1, 1]).int()},
    "values must be a tensor of shape (3,), got (2,)": {"values": torch.ones(2)},
    "values must have factors' dtype torch.float32, got torch.int64": {"values": torch.ones(3).long()},
    "values must be on factors' device cpu, got meta": {"values": torch.ones(3, device="meta")},
    "values must be finite, got nan": {"values": torch.tensor([1, NAN, 1])},
    "values must be finite, got -inf": {"values": torch.tensor([1, -INF, 1])},
    "values must be finite, got inf": {"values": torch.tensor([1, 1, INF])},
    "reg must be finite and at least 0, got -1.0": {"reg": -1.0},
    "reg must be finite and at least 0, got nan": {"reg": NAN},
    "reg must be finite and at least 0, got inf": {"reg": INF},
    "reg must be finite and at least 0, got 'x'": {"reg": "x"},
}
CHANGING = {
    "factors must be contiguous, as they change in place, got strides (1, 3)": {
        "factors": torch.ones(2, 3).T
    },
    "what it changes must not require a gradient while gradients are recorded: call it under "
    "torch.no_grad()": {"factors": torch.ones(3, 2, requires_grad=True)},
}
ALS = {
    "alpha must be finite and positive, got 0.0": {"alpha": 0.0},
    "alpha must be finite and positive, got nan": {"alpha": NAN},
    "alpha must be finite and positive, got inf": {"alpha": INF},
    "weighted_reg must be finite and at least 0, got -0.5": {"weighted_reg": -0.5},
    "values must be a tensor unless implicit, got None": {"values": None},
    "weight must be None where implicit, whose values are weights, got a tensor": {
        "weight": torch.ones(3),
        "implicit": True,
    },
    "weight must be at least 0, got -1.0": {"weight": -torch.ones(3)},
    "weight must be a tensor of shape (3,), got (4,)": {"weight": torch.ones(4)},
    "values must be at least 0, got -1.0": {"values": -torch.ones(3), "implicit": True},
}
SOLVING = {
    "solver must be one of cholesky, cg, got 'lu'": {"solver": "lu"},
    "cg_steps must be an integer from 1 to 2 ** 63 - 1, got 0": {"cg_steps": 0, "solver": "cg"},
    "cg_steps must be an integer from 1 to 2 ** 63 - 1, got 1.5": {"cg_steps": 1.5, "solver": "cg"},
    "backend must be one of cpu, cuda, triton, reference, got 'gpu'": {"backend": "gpu"},
}
NMF = {
    "values must be at least 0, got -1.0": {"values": -torch.ones(3)},
    "factors must be at least 0, got -1.0": {"factors": -torch.ones(3, 2)},
    "other_factors must be at least 0, got -1.0": {"other_factors": -torch.ones(4, 2)},
    "factors must be finite, got nan": {"factors": torch.full((3, 2), NAN)},
    "eps must be finite and positive, got 0.0": {"eps": 0.0},
    "eps must be finite and positive, got inf": {"eps": INF},
}
CALLS = [
    (function, message, changes)
    for function, tables in (
        (lk.mf_als_, (COMMON, CHANGING, ALS, SOLVING)),
        (lk.mf_als_loss, (COMMON, ALS)),
        (lk.nmf_, (COMMON, CHANGING, NMF)),
    )
    for table in tables
    for message, changes in table.items()
]


@pytest.mark.parametrize("function, message, changes", CALLS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments(function, message, changes):
    before = given(**changes)["factors"]
    kept = before.clone() if isinstance(before, torch.Tensor) else before
    for backend in (None, "reference"):
        with pytest.raises(ValueError) as error:
            function(**({"backend": backend} | given(**changes)))
        assert str(error.value) == f"{function.__name__}: {message}"
    if isinstance(kept, torch.Tensor):
        assert torch.equal(before.nan_to_num(), kept.nan_to_num())


@pytest.mark.parametrize("function", [lk.mf_als_, lk.nmf_])
def test_factors_that_overlap(function):
    whole = torch.ones(7, 2)
    with pytest.raises(ValueError, match=r"_: other_factors must lie apart from factors, got memory of both"):
        function(**given(factors=whole[:3], other_factors=whole[2:6]))
    function(**given(factors=whole[:3], other_factors=whole[3:]))


@pytest.mark.parametrize("function, op", [(lk.mf_als_, "mf_als"), (lk.nmf_, "nmf")])
@pytest.mark.parametrize("k", [2, 16])
def test_what_cannot_be_read_beforehand_touches_no_other_memory(function, op, k):
    """Under torch.compile nothing is checked until the kernel runs."""
    for entries in (3, 9):  # fewer and more than rows of other_factors, which the kernel may copy
        indptr, indices = torch.tensor([0, 2, 2, entries]), torch.arange(entries) % 4
        indices[1] = 2**40
        factors = torch.ones(3, k)
        run = torch.compile(
            lambda x, i, entries=indptr: function(
                x, torch.ones(4, k), entries, i, torch.ones(len(i)), reg=1.0
            ),
            backend="eager",
        )
        with pytest.raises(
            ValueError, match=f"{op}_: indices must name rows of other_factors, got another in row 0"
        ):
            run(factors, indices)
        assert torch.equal(factors[0], torch.ones(k)) and not torch.equal(factors[2], torch.ones(k))
    for indptr, message in (([0, 2, 1, 3], "not decrease"), ([0, 2, 2, 2**40], "go from 0 to the number")):
        with pytest.raises(ValueError, match=f"indptr must {message}"):
            arguments = torch.ones(3, 2), torch.ones(4, 2), torch.tensor(indptr), torch.tensor([0, 3, 1])
            more = (torch.zeros(1, dtype=torch.int64), 1.0, 1.0, 1)
            if op == "mf_als":
                more = (None, torch.zeros(2, dtype=torch.int64), 1.0, 0.0, 1.0, False, 0, 1)
            getattr(compiled.cpu, f"{op}_update")(*arguments, torch.ones(3), *more)


def test_the_loss_of_an_index_that_is_none_is_nan():
    loss = torch.zeros(())
    bad = (
        torch.ones(3, 2),
        torch.ones(4, 2),
        torch.tensor([0, 2, 2, 3]),
        torch.tensor([0, 4, 1]),
        torch.ones(3),
    )
    compiled.cpu.mf_als_loss(*bad, None, loss, 1.0, 1.0, 1.0, False, 1)
    assert loss.isnan()


def test_the_bindings_refuse_what_would_touch_other_memory():
    good = [
        torch.ones(3, 2),
        torch.ones(4, 2),
        torch.tensor([0, 2, 2, 3]),
        torch.tensor([0, 3, 1]),
        torch.ones(3),
    ]
    last = None, torch.zeros(2, dtype=torch.int64), 1.0, 0.0, 1.0, False, 0, 1
    compiled.cpu.mf_als_update(*good, *last)
    for message, at, wrong in (
        ("factors must be contiguous", 0, torch.ones(2, 3).T),
        ("other_factors must have 2 dimensions", 1, torch.ones(4)),
        ("other_factors must have another number of elements", 1, torch.ones(4, 3)),
        ("indptr must have another number of elements", 2, torch.tensor([0, 3])),
        ("indices must be int32 or int64", 3, torch.ones(3)),
        ("values must have another number of elements", 4, torch.ones(2)),
        ("factors must have the dtype that the contract names", 0, torch.ones(3, 2).half()),
    ):
        with pytest.raises(ValueError, match=message):
            compiled.cpu.mf_als_update(*good[:at], wrong, *good[at + 1 :], *last)


def test_only_the_reference_gives_the_loss_a_gradient():
    factors = torch.ones(3, 2, requires_grad=True)
    lk.mf_als_loss(**given(factors=factors), backend="reference").backward()
    assert factors.grad.any()
    with pytest.raises(
        NotImplementedError, match=r'^mf_als_loss: backend must be "reference" for a gradient'
    ):
        lk.mf_als_loss(**given(factors=factors)).backward()
