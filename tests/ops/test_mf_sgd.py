"""mf_sgd_: one pass over ratings, in the order of their blocks, on any number of threads."""

import math

import pytest
import torch
from ops.blocks import rating_blocks

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import mf_sgd as reference

FACTORS = [1, 7, 16, 33, 64, 100, 128, 512]
OPTIONS = {
    "plain": {},
    "groups": {"lr": (0.05, 0.02), "reg": (0.1, 0.2, 0.3, 0.4)},
    "l1": {"l1": (0.3, 0.1), "reg": 0.05},
    "nonnegative": {"nonnegative": True, "reg": 0.05},
    "squares": {"squares": True, "reg": 0.05, "lr": 0.2},
    "logistic": {"loss": "logistic", "reg": 0.05},
    "all": {"l1": 0.05, "nonnegative": True, "squares": True, "reg": 0.1, "loss": "logistic", "mean": 0.3},
}


def problem(factors=16, users=40, items=30, count=300, weight=False):
    """Tables and ratings from 0 to 1, of each user and item at random, some pairs twice.

    Rows are short enough that a step shrinks errors: else what was rounded would grow.
    """
    size = 1.2 / max(factors, 16) ** 0.5
    tables = [size * torch.randn(n, factors) for n in (users, items)] + [
        torch.randn(n) for n in (users, items)
    ]
    ids = [torch.randint(n, (count,)) for n in (users, items)]
    return tables, [*ids, torch.rand(count), torch.rand(count) if weight else None]


def spread(value, count):
    return tuple(value) if isinstance(value, tuple) else (value,) * count


def expected(
    tables, blocks, squares=None, mean=0.0, lr=0.05, reg=0.0, l1=0.0, loss="squared", nonnegative=False
):
    """The reference in the dtype of the tables: what they become, and the loss."""
    tables = [t.clone() for t in tables]
    squares = squares or (None, None)
    total = reference.mf_sgd(
        *tables, *squares, blocks.users, blocks.items, blocks.ratings, blocks.weight, mean=mean,
        lr=spread(lr, 2), reg=spread(reg, 4), l1=spread(l1, 2), nonnegative=nonnegative,
        logistic=loss == "logistic",
    )  # fmt: skip
    return *tables, *(s for s in squares if s is not None), total.to("cpu", tables[0].dtype)


def ours(tables, blocks, squares=None, lr=0.05, **options):
    tables = [t.clone() for t in tables]
    squares = squares and tuple(squares)
    total = lk.mf_sgd_(*tables, blocks, squares=squares, lr=lr, **options)
    return *tables, *(squares or ()), total


@pytest.mark.every_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("factors", FACTORS)
def test_oracle(factors, options):
    options = dict(OPTIONS[options])
    adaptive = options.pop("squares", False)
    tables, ratings = problem(factors, count=120, weight=factors % 2 == 0)
    blocks = rating_blocks(*ratings, num_users=40, num_items=30)

    def of(function):
        def call(*tables):
            squares = [torch.full_like(b, 0.25) for b in tables[2:]] if adaptive else None
            return function(tables, blocks, squares, **options)

        return call

    oracle.check(of(ours), of(expected), tables, gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 2000])
def test_any_number_of_ratings(count):
    tables, ratings = problem(count=count)
    blocks = rating_blocks(*ratings, num_users=40, num_items=30)
    oracle.check(lambda *t: ours(t, blocks), lambda *t: expected(t, blocks), tables, gradients=False)


@pytest.mark.every_backend
def test_without_biases():
    tables, ratings = problem()
    blocks = rating_blocks(*ratings, num_users=40, num_items=30)

    def of(function):
        return lambda p, q: [t for t in function([p, q, None, None], blocks) if t is not None]

    def reference_call(tables, blocks):
        tables = [None if t is None else t.clone() for t in tables]
        none = (None, None)
        total = reference.mf_sgd(*tables, *none, blocks.users, blocks.items, blocks.ratings, lr=(0.05, 0.05))
        return *tables, total.to("cpu", tables[0].dtype)

    def kernel_call(tables, blocks):
        tables = [None if t is None else t.clone() for t in tables]
        return *tables, lk.mf_sgd_(*tables, blocks, lr=0.05)

    oracle.check(of(kernel_call), of(reference_call), tables[:2], gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_same_bits_for_any_number_of_threads(dtype, options):
    options = dict(OPTIONS[options])
    tables, ratings = problem(factors=20, users=300, items=200, count=20000)
    tables[:2] = [t.to(dtype) for t in tables[:2]]
    blocks = rating_blocks(*ratings)
    results, threads = [], torch.get_num_threads()
    adaptive = options.pop("squares", False)
    try:
        for n in (1, 2, 5, 2):
            torch.set_num_threads(n)
            assert all(
                torch.equal(a, b)
                for a, b in zip(vars(rating_blocks(*ratings)).values(), vars(blocks).values(), strict=True)
                if isinstance(a, torch.Tensor)
            )
            squares = [torch.ones(300), torch.ones(200)] if adaptive else None
            results.append(ours(tables, blocks, squares, **options))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_ratings_alone_are_taken_in_the_order_of_their_blocks():
    tables, ratings = problem()
    a, b = [t.clone() for t in tables], [t.clone() for t in tables]
    blocks = rating_blocks(*ratings, num_users=40, num_items=30)
    assert lk.mf_sgd_(*a, *ratings[:3], lr=0.05) == lk.mf_sgd_(*b, blocks, lr=0.05)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.every_backend
def test_bfloat16_rounds_at_random_and_in_proportion():
    """A step of a hundredth of the distance between two numbers is taken one time in a hundred."""
    ids = torch.arange(20000)

    def step(seed):
        # The prediction is 64; an error of 1 times lr moves each factor by 2 ** -7 / 100.
        p, q = (torch.ones(20000, 64, dtype=torch.bfloat16) for _ in range(2))
        lk.mf_sgd_(p, q, None, None, ids, ids, torch.full((20000,), 65.0), lr=2**-7 / 100, seed=seed)
        return p, q

    p, q = step(0)
    error = math.sqrt(0.01 * 0.99 / p.numel())
    for t in (p, q):
        assert set(t.unique().tolist()) == {1.0, 1 + 2**-7}
        assert abs((t != 1).double().mean().item() - 0.01) < 5 * error
        assert (t != 1).sum(0).max() < 2 * 200  # and at every factor
    assert not torch.equal(p, q)
    assert torch.equal(step(0)[0], p)
    assert not torch.equal(step(1)[0], p)


@pytest.mark.every_backend
def test_bfloat16_is_float32_rounded_up_or_down():
    tables, (users, items, ratings, _) = problem(factors=37, users=50, items=50, count=50)
    users, items = torch.randperm(50), torch.randperm(50)  # no row twice
    exact = [t.bfloat16().float() if t.dim() == 2 else t.clone() for t in tables]
    half = [t.bfloat16() if t.dim() == 2 else t.clone() for t in tables]
    lk.mf_sgd_(*exact, users, items, ratings, lr=0.1, reg=0.1)
    lk.mf_sgd_(*half, users, items, ratings, lr=0.1, reg=0.1)
    for a, b in zip(exact, half, strict=True):
        assert torch.equal(a, b) or (a - b.float()).abs().le(a.abs() * 2**-7 + 1e-38).all()


@pytest.mark.every_backend
def test_it_learns_a_table_of_low_rank():
    u, v = torch.randn(200, 4), torch.randn(150, 4)
    users, items = torch.randint(200, (12000,)), torch.randint(150, (12000,))
    ratings = (u[users] * v[items]).sum(1) + 3 + 0.1 * torch.randn(12000)
    tables = [0.1 * torch.randn(200, 8), 0.1 * torch.randn(150, 8), torch.zeros(200), torch.zeros(150)]
    blocks = rating_blocks(users, items, ratings)
    losses = [lk.mf_sgd_(*tables, blocks, mean=3.0, lr=0.02, reg=0.002) / 12000 for _ in range(60)]
    assert losses[0] > 2  # the ratings' variance is 4
    assert losses[-1] < 0.02  # the noise is 0.01


@pytest.mark.every_backend
def test_what_is_not_finite_stays_so():
    for dtype in (torch.float32, torch.bfloat16):
        tables, ratings = problem()
        tables[:2] = [t.to(dtype) for t in tables[:2]]
        tables[0][3, 5] = math.inf
        lk.mf_sgd_(*tables, *ratings[:3], lr=0.05)
        assert not tables[0][3].isfinite().all()


def test_opcheck():
    tables, ratings = problem()
    blocks = rating_blocks(*ratings, num_users=40, num_items=30)
    arguments = (*tables, None, None, blocks.users, blocks.items, blocks.ratings, None, blocks.offsets)
    step = [0.0, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0]
    losses = torch.zeros(blocks.offsets.numel() - 1)
    torch.library.opcheck(torch.ops.lspm.mf_sgd.default, (*arguments, losses, step, False, False, 0, "cpu"))


@pytest.mark.every_backend
@pytest.mark.parametrize("backend", [None, "reference"])
def test_with_rates_of_rows_biases_do_not_run_away_from_small_factors(backend):
    """A row's gradients are as small as the other's factors, and a bias's are not."""
    users, items = torch.randint(30, (2000,)), torch.randint(20, (2000,))
    ratings = torch.randn(30)[users] + torch.randn(20)[items]
    tables = [1e-3 * torch.randn(30, 8), 1e-3 * torch.randn(20, 8), torch.zeros(30), torch.zeros(20)]
    squares = torch.zeros(30), torch.zeros(20)
    losses = [
        lk.mf_sgd_(*tables, users, items, ratings, lr=0.05, squares=squares, backend=backend).item()
        for _ in range(4)
    ]
    assert losses[-1] < 0.1 * losses[0] <= 0.1 * 2 * ratings.square().sum()
