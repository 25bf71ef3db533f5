"""mf: the public function, under every instruction set."""

from functools import partial

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import mf as ops
from lspm_kernels.reference import mf as reference

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# users, items, factors, pairs: one; a vector and a rest; rows that go on over several runs; most rows empty.
SHAPES = [(1, 1, 1, 1), (5, 7, 18, 40), (3, 200, 64, 1000), (900, 40, 50, 33), (40, 30, 300, 77)]
EMPTY = [(3, 4, 5, 0), (0, 0, 4, 0), (3, 4, 0, 6), (0, 3, 2, 0)]


def tables(shape, dtype):
    U, N, K, _ = shape
    return [torch.randn(size).to(dtype) for size in ((U, K), (N, K), (U,), (N,))]


def pairs(shape, dtype=torch.int64):
    """Some users and items much more often than others."""
    n = shape[3]
    return [(torch.rand(n) ** 3 * size).to(dtype) for size in shape[:2]]


def bound(op, users, items, **options):
    """op as a function of its tables."""
    names = "user_bias", "item_bias"
    return lambda u, i, *bias: op(u, i, users, items, **dict(zip(names, bias, strict=False)), **options)


def check(shape, dtype, ids=None, biased=True, mean=0.5):
    ids = ids or pairs(shape)
    tensors = tables(shape, dtype)[: 4 if biased else 2]
    oracle.check(*(bound(op, *ids, mean=mean) for op in (lk.mf, reference.mf)), tensors)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_against_the_reference(shape, dtype):
    check(shape, dtype)
    check(shape, dtype, pairs(shape, torch.int32), biased=False, mean=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for shape in SHAPES[1:] + EMPTY[:3]:
        check(shape, dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_round_little(dtype):
    shape = (2, 3, 9, 40_000)
    tensors = [t.abs() for t in tables(shape, dtype)]
    ids = pairs(shape)
    oracle.check(*(bound(op, *ids) for op in (lk.mf, reference.mf)), tensors)


@pytest.mark.every_backend
def test_one_bias_without_the_other():
    shape = SHAPES[1]
    u, i, a, b = tables(shape, F32)
    ids = pairs(shape)
    for name, bias in (("user_bias", a), ("item_bias", b)):
        both = [lambda *t, f=f, name=name: f(*t[:2], *ids, **{name: t[2]}) for f in (lk.mf, reference.mf)]
        oracle.check(*both, [u, i, bias])


@pytest.mark.every_backend
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_that_are_wanted(wanted):
    shape = (6, 9, 20, 50)
    ids, tensors = pairs(shape), tables(shape, F32)
    kept = [t.requires_grad_(bool(wanted >> n & 1)) for n, t in enumerate(tensors)]
    leaves = [t for t in kept if t.requires_grad]
    weights = torch.randn(50)
    ours, theirs = (
        torch.autograd.grad(bound(f, *ids)(*tensors), leaves, weights) for f in (lk.mf, reference.mf)
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.every_backend
@pytest.mark.parametrize(
    "shapes", [((5, 1), (5, 8)), ((4,), (3, 4)), ((), (3,)), ((2, 3, 4), (2, 3, 4)), ((), ())]
)
def test_ids_of_any_shape_that_broadcast(shapes):
    users, items = torch.randint(6, shapes[0]), torch.randint(9, shapes[1], dtype=torch.int32)
    tensors = tables((6, 9, 20, 0), F32)
    oracle.check(*(bound(op, users, items) for op in (lk.mf, reference.mf)), tensors)
    assert lk.mf(*tensors[:2], users, items).shape == torch.broadcast_shapes(*shapes)


@pytest.mark.every_backend
def test_memory_that_is_not_contiguous():
    users, items = torch.randint(6, (10, 2))[:, 0], torch.randint(9, (10, 3))[:, 1]
    make = [torch.randn(20, 6).t(), torch.randn(9, 40)[:, ::2], torch.randn(6, 2)[:, 1], torch.randn(18)[::2]]
    oracle.check(*(bound(op, users, items) for op in (lk.mf, reference.mf)), make)


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_special_values_stay_in_their_pairs(value):
    tensors = tables((6, 9, 20, 0), F32)
    tensors[0][2, 3] = tensors[3][4] = value
    users, items = torch.randint(6, (30,)), torch.randint(9, (30,))
    oracle.check(*(bound(op, users, items) for op in (lk.mf, reference.mf)), tensors, gradients=False)
    leaves = [t.requires_grad_() for t in tensors]
    ours, theirs = (
        torch.autograd.grad(bound(f, users, items)(*leaves).sum(), leaves) for f in (lk.mf, reference.mf)
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    shape = (300, 200, 33, 70_000)  # so many that there are several histograms
    ids, tensors = pairs(shape), tables(shape, dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(oracle.outputs_and_gradients(bound(lk.mf, *ids), tensors))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name
    part = bound(lk.mf, ids[0][17:50], ids[1][17:50])(*tensors)
    assert torch.equal(part, results[0]["output 0"][17:50])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name, last", [("users", 5), ("items", 8)])
@pytest.mark.parametrize("wrong", ["one more", -1, -(2**40), 2**40, 2**62])
def test_an_id_that_is_none(name, last, wrong, backend):
    u, i, *_ = tables((6, 9, 4, 0), F32)
    ids = {"users": torch.randint(6, (3000,)), "items": torch.randint(9, (3000,))}
    wrong = last + 1 if wrong == "one more" else wrong
    ids[name][[1100, 2999]] = torch.tensor([wrong, last + 7])  # of several the first is named
    with pytest.raises(ValueError) as error:
        lk.mf(u.requires_grad_(), i, **ids, backend=backend)
    assert str(error.value) == f"mf: {name} must be from 0 to {last}, got {wrong}"


def test_no_table_and_yet_an_id():
    with pytest.raises(ValueError, match="mf: users must be from 0 to -1, got 0"):
        lk.mf(torch.ones(0, 2), torch.ones(3, 2), torch.tensor([0]), torch.tensor([0]))


U, V, N = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)
MATRIX = "must be a floating-point tensor of two dimensions"
INTEGERS = "must be a tensor of torch.int64 or torch.int32"
BAD = {
    f"user_factors {MATRIX}, got list": (([1.0], V, N, N), {}),
    f"item_factors {MATRIX}, got (3,) torch.float32": ((U, V[0], N, N), {}),
    f"user_factors {MATRIX}, got (4, 3) torch.int64": ((U.long(), V, N, N), {}),
    "item_factors must have user_factors' 3 factors in a row, got (5, 2)": ((U, V[:, :2], N, N), {}),
    "item_factors must have user_factors' dtype torch.float32, got torch.float16": ((U, V.half(), N, N), {}),
    "item_factors must be on user_factors' device cpu, got meta": ((U, V.to("meta"), N, N), {}),
    "user_bias must be a tensor of shape (4,), got (5,)": ((U, V, N, N), {"user_bias": V[:, 0]}),
    "item_bias must be a tensor of shape (5,), got (5, 1)": ((U, V, N, N), {"item_bias": V[:, :1]}),
    "item_bias must have dtype torch.float32, got torch.float16": (
        (U, V, N, N), {"item_bias": V[:, 0].half()},
    ),
    f"users {INTEGERS}, got torch.float32": ((U, V, N.float(), N), {}),
    f"items {INTEGERS}, got list": ((U, V, N, [0, 1]), {}),
    f"items {INTEGERS}, got torch.bool": ((U, V, N, N.bool()), {}),
    "users must be on user_factors' device cpu, got meta": ((U, V, N.to("meta"), N), {}),
    "items must have a shape that broadcasts with users' (2,), got (3,)": ((U, V, N, N.new_zeros(3)), {}),
    "mean must be a number, got Tensor": ((U, V, N, N), {"mean": torch.ones(())}),
    "mean must be a number, got bool": ((U, V, N, N), {"mean": True}),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    given, options = BAD[message]
    with pytest.raises(ValueError) as error:
        lk.mf(*given, **options, backend=backend)
    assert str(error.value) == f"mf: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    ratings = torch.empty(2)
    forward = partial(compiled.cpu.mf_forward, mean=0.0, threads=1)
    backward = partial(compiled.cpu.mf_backward, threads=1)
    nothing = (None,) * 4
    for message, (call, *given) in {
        "user_factors must have 2 dimensions": (forward, U[0], V, None, None, N, N, ratings),
        "item_factors must have another number": (
            forward,
            U,
            V[:, :2].contiguous(),
            None,
            None,
            N,
            N,
            ratings,
        ),
        "user_factors must be contiguous": (forward, U.t(), V, None, None, N, N, ratings),
        "user_bias must have another number": (forward, U, V, V[0], None, N, N, ratings),
        "items must have another number": (forward, U, V, None, None, N, N[:1], ratings),
        "users must have the dtype": (forward, U, V, None, None, N.int(), N, ratings),
        "ratings must have another number": (forward, U, V, None, None, N, N, ratings[:1]),
        "dratings must have another number": (backward, ratings[:1], U, V, N, N, *nothing),
        "duser_factors must have another number": (backward, ratings, U, V, N, N, V, *nothing[1:]),
        "mf: users must be from 0 to 3, got 4": (backward, ratings, U, V, N + 4, N, *nothing),
        "mf: items must be from 0 to 4, got -1": (backward, ratings, U, V, N, N - 1, *nothing),
    }.items():
        with pytest.raises(ValueError, match=message):
            call(*given)


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.warns(lk.FallbackWarning, match="mf: cpu needs dtype float32, bfloat16, float16"):
        assert lk.mf(U.double(), V.double(), N, N).dtype == torch.float64
