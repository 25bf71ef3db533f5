"""top_k_scores: the public function, under every instruction set."""

import multiprocessing
import sys
from functools import partial

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import top_k_scores as ops
from lspm_kernels.reference import top_k_scores as reference

sys.path.append(str(oracle.__file__).replace("tests/oracle.py", "benchmarks"))

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
# queries, items, dimension, k: one of all; fewer items than k; several blocks of items; long sums; many rows.
SHAPES = [(1, 1, 1, 1), (3, 20, 7, 30), (30, 1100, 64, 10), (2, 200, 700, 33), (300, 130, 16, 3)]
EMPTY = [(0, 5, 4, 2), (3, 0, 4, 2), (0, 0, 0, 1), (3, 5, 0, 2)]


def integers(shape, dtype):
    """Whose sums of products every order of additions gives exactly, with many scores that are equal."""
    return torch.randint(-2, 3, shape).to(dtype)


def exclusions(queries, items, most, dtype=torch.int64):
    """Lists in no order, with repetitions, some of them empty."""
    counts = torch.randint(most + 1, (queries,)) * (torch.rand(queries) < 0.8)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return indptr.to(dtype), torch.randint(max(items, 1), (int(indptr[-1]),)).to(dtype)


def identical(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def check_exact(shape, dtype, biased=True, excluded=True):
    B, N, D, k = shape
    q, i = integers((B, D), dtype), integers((N, D), dtype)
    bias = integers((N,), F32) if biased else None
    lists = exclusions(B, N, 2 * N if N < 300 else 40) if excluded and N else (None, None)
    ours = lk.top_k_scores(q, i, k, item_bias=bias, exclude_indptr=lists[0], exclude_indices=lists[1])
    assert ours[0].dtype == F32 and ours[1].dtype == torch.int64 and ours[0].shape == (B, k)
    identical(ours, reference.top_k_scores(q, i, k, bias, *lists))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_equal_scores_go_by_index(shape, dtype):
    for biased, excluded in ((True, True), (False, True), (True, False), (False, False)):
        check_exact(shape, dtype, biased, excluded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for shape in (SHAPES + EMPTY)[1:]:
        check_exact(shape, dtype)
    check_scores(dtype, (29, 700, 300, 20))
    check_special_values(dtype)


def check_scores(dtype, shape):
    """By the oracle's rule, and the indices are of items that score so."""
    B, N, D, k = shape
    q, i, bias = (torch.randn(size).to(dtype) for size in ((B, D), (N, D), (N,)))
    oracle.check(
        lambda *t: lk.top_k_scores(*t[:2], k, item_bias=t[2])[0],
        lambda *t: reference.top_k_scores(*t[:2], k, t[2])[0],
        [q, i, bias],
        gradients=False,
    )
    scores, indices = lk.top_k_scores(q, i, k, item_bias=bias)
    assert all(len(row.unique()) == k for row in indices)
    wide = [t.double() for t in (q, i, bias)]
    of_indices = (wide[0] @ wide[1].T + wide[2]).gather(1, indices)
    plain = (q.float() @ i.float().T + bias.float()).gather(1, indices)
    oracle.compare("scores of indices", scores, of_indices, plain)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 3000, 64, 10), (65, 900, 50, 100), (29, 700, 256, 20), (30, 300, 1030, 5)]
)
def test_against_the_reference(shape, dtype):
    check_scores(dtype, shape)


@pytest.mark.every_backend
def test_many_items_and_a_large_k():
    check_exact((2, 6000, 8, 1000), F32)
    check_exact((31, 3000, 3, 2999), BF16)


def check_special_values(dtype):
    i = integers((90, 5), dtype)
    i[3, 0] = i[60, 2] = NAN
    i[4, 0] = i[61, 1] = INF
    i[5] = -1e30 if dtype is not F16 else -6e4
    q = integers((4, 5), dtype)
    q[0] = 1
    q[2] = NAN
    q[3] = 0  # times INF is NaN
    bias = integers((90,), F32)
    bias[[7, 8, 70]] = torch.tensor([-INF, -INF, INF])
    for k in (1, 3, 89, 95):
        identical(lk.top_k_scores(q, i, k, item_bias=bias), reference.top_k_scores(q, i, k, bias))


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_comes_first_and_infinities_are_scores(dtype):
    check_special_values(dtype)
    scores, indices = lk.top_k_scores(torch.ones(1, 1), torch.tensor([[1.0], [NAN], [INF], [-INF], [NAN]]), 6)
    assert indices.tolist() == [[1, 4, 2, 0, 3, -1]]
    assert str(scores.tolist()) == "[[nan, nan, inf, 1.0, -inf, -inf]]"
    zeros = lk.top_k_scores(torch.tensor([[-1.0]]), torch.tensor([[0.0], [-0.0], [0.0]]), 3)
    assert zeros[1].tolist() == [[0, 1, 2]]


@pytest.mark.every_backend
def test_a_row_that_excludes_all_and_a_slice_of_lists():
    q, i = integers((4, 8), F32), integers((70, 8), F32)
    indptr = torch.tensor([0, 70, 70, 72, 210], dtype=torch.int32)
    indices = torch.cat([torch.randperm(70), torch.tensor([5, 5]), torch.arange(69).repeat(2)]).int()
    call = partial(lk.top_k_scores, items=i, k=3, exclude_indices=indices)
    scores, found = call(q, exclude_indptr=indptr)
    assert found[0].tolist() == [-1] * 3 and found[3].tolist() == [69, -1, -1]
    assert scores[0].tolist() == [-INF] * 3 and 5 not in found[2]
    for batch in (slice(0, 1), slice(1, 3), slice(2, 4)):
        parts = call(q[batch], exclude_indptr=indptr[batch.start : batch.stop + 1])
        identical(parts, (scores[batch], found[batch]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_depends_on_its_query_and_item_alone(dtype):
    q, i = torch.randn(300, 70).to(dtype), torch.randn(1500, 70).to(dtype)
    lists = exclusions(300, 1500, 300)
    call = partial(lk.top_k_scores, k=20)
    whole = call(q, i, exclude_indptr=lists[0], exclude_indices=lists[1])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for first, last in ((0, 300), (0, 1), (17, 18), (40, 57)):
            part = lists[0][first : last + 1]
            found = call(q[first:last], i, exclude_indptr=part, exclude_indices=lists[1])
            identical(found, [t[first:last] for t in whole])
    items, bias = torch.cat([i[:13], i]), torch.cat([torch.full((13,), -1e30), torch.zeros(1500)])
    moved = call(q, items, item_bias=bias, exclude_indptr=lists[0], exclude_indices=lists[1] + 13)
    identical(moved, (whole[0], whole[1] + 13))


@pytest.mark.every_backend
def test_memory_that_is_not_contiguous_is_read_where_it_lies():
    wide = torch.randn(50, 200)
    q, i = wide[:9, 3:40], wide[:, 100:137]
    lists = exclusions(9, 50, 20)
    options = {"item_bias": torch.randn(50, 2)[:, 1], "exclude_indptr": lists[0].repeat_interleave(2)[::2]}
    options["exclude_indices"] = lists[1].repeat_interleave(2)[::2]
    plain = [t.clone() for t in (q, i)], {name: t.clone() for name, t in options.items()}
    identical(lk.top_k_scores(q, i, 4, **options), lk.top_k_scores(*plain[0], 4, **plain[1]))
    q, i = integers((6, 9), F32).t(), integers((6, 40), F32).t()
    identical(lk.top_k_scores(q, i, 4), reference.top_k_scores(q, i, 4))
    assert lk.top_k_scores(q[:0], i, 4)[1].shape == (0, 4)
    assert lk.top_k_scores(q, i[:0], 4)[1].eq(-1).all()


def _peak(shape, k):
    import machine  # of benchmarks/

    B, N, D = shape
    q, i = torch.randn(B, D), torch.randn(N, D)
    call = partial(lk.top_k_scores, q, i, k, item_bias=torch.randn(N))
    lk.top_k_scores(q[:2], i[:200], 2)
    return machine.peak_bytes(call)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_takes_a_twentieth_of_the_matrix_of_scores():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for (B, N, D), k in (((2000, 20000, 16), 10), ((4000, 10000, 8), 100)):
            peak = pool.apply(_peak, ((B, N, D), k))
            assert peak is None or peak <= B * N * 4 / 20 + B * k * 12


def test_a_gradient_is_an_error():
    q, i = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    scores, indices = lk.top_k_scores(q, i, 2)
    assert not indices.requires_grad
    message = "top_k_scores: scores have no gradient: score the indices that it gives by a function that has"
    with pytest.raises(NotImplementedError, match=message):
        scores.sum().backward()


X, Y, P, E = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1, 2]), torch.tensor([0, 3])
MATRIX = "must be a floating-point tensor of two dimensions"
COUNT = "exclude_indptr must be from 0 to the number of exclude_indices, which is 2"


def lists(indptr, indices=E):
    return {"exclude_indptr": torch.tensor(indptr), "exclude_indices": torch.as_tensor(indices)}


BAD = {
    f"queries {MATRIX}, got list": (([1.0], Y, 1), {}),
    f"queries {MATRIX}, got (3,) torch.float32": ((X[0], Y, 1), {}),
    f"items {MATRIX}, got (4, 3) torch.int64": ((X, Y.long(), 1), {}),
    "items must have queries' dimension 3, got (4, 2)": ((X, Y[:, :2], 1), {}),
    "items must have queries' dtype torch.float32, got torch.float16": ((X, Y.half(), 1), {}),
    "items must be on queries' device cpu, got meta": ((X, Y.to("meta"), 1), {}),
    "k must be an integer from 1 to 2 ** 63 - 1, got 0": ((X, Y, 0), {}),
    "k must be an integer from 1 to 2 ** 63 - 1, got -2": ((X, Y, -2), {}),
    "k must be an integer from 1 to 2 ** 63 - 1, got 2.0": ((X, Y, 2.0), {}),
    "k must be an integer from 1 to 2 ** 63 - 1, got True": ((X, Y, True), {}),
    f"k must be an integer from 1 to 2 ** 63 - 1, got {2**63}": ((X, Y, 2**63), {}),
    "item_bias must be a tensor of shape (4,), got (3,)": ((X, Y, 1), {"item_bias": X[0]}),
    "item_bias must have dtype torch.float32, got torch.float16": ((X, Y, 1), {"item_bias": Y[:, 0].half()}),
    "exclude_indices must be there exactly where exclude_indptr is, got NoneType": (
        (X, Y, 1), {"exclude_indptr": P},
    ),
    "exclude_indptr must be a tensor of shape (3,), got (2,)": ((X, Y, 1), lists([0, 2])),
    "exclude_indptr must have dtype torch.int64 or torch.int32, got torch.float32": (
        (X, Y, 1), lists([0.0, 1.0, 2.0]),
    ),
    "exclude_indices must be a tensor of one dimension, got (1, 2)": ((X, Y, 1), lists([0, 1, 2], E[None])),
    "exclude_indptr must be on queries' device cpu, got meta": (
        (X, Y, 1), {"exclude_indptr": P.to("meta"), "exclude_indices": E},
    ),
    "exclude_indptr must not decrease, got 1 after 2": ((X, Y, 1), lists([0, 2, 1])),
    f"{COUNT}, got 3": ((X, Y, 1), lists([0, 2, 3])),
    f"{COUNT}, got -1": ((X, Y, 1), lists([-1, 0, 2])),
    f"{COUNT}, got 1099511627776": ((X, Y, 1), lists([0, 2**40, 2])),
    "exclude_indices must be from 0 to 3, got -1": ((X, Y, 1), lists([0, 1, 2], [0, -1])),
    "exclude_indices must be from 0 to 3, got 4": ((X, Y, 1), lists([0, 0, 2], [4, 9])),
    "exclude_indices must be from 0 to -1, got 0": ((X, Y[:0], 1), lists([0, 0, 2])),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    given, options = BAD[message]
    with pytest.raises(ValueError) as error:
        lk.top_k_scores(*given, **options, backend=backend)
    assert str(error.value) == f"top_k_scores: {message}"


def test_the_first_of_many_wrong_exclusions_is_named():
    wrong = torch.zeros(200_000, dtype=torch.int64)
    wrong[[120_000, 150_000]] = torch.tensor([77, 78])
    with pytest.raises(ValueError, match="exclude_indices must be from 0 to 3, got 77"):
        lk.top_k_scores(X, Y, 1, exclude_indptr=torch.tensor([0, 100_000, 200_000]), exclude_indices=wrong)


def test_the_binding_refuses_what_would_touch_other_memory():
    scores, indices = torch.empty(2, 3), torch.empty(2, 3, dtype=torch.int64)
    call = partial(compiled.cpu.top_k_scores_forward, threads=1)
    for message, wrong in {
        "queries must have a contiguous last dimension": (Y.t(), Y, None, None, None, scores, indices),
        "items must have the dimension of queries": (X, Y[:, :2], None, None, None, scores, indices),
        "item_bias must have another number": (X, Y, X[0], None, None, scores, indices),
        "exclude_indptr must have another number": (X, Y, None, P[:2], E, scores, indices),
        "exclude_indices must be there exactly": (X, Y, None, P, None, scores, indices),
        "scores must have a row for each query": (X, Y, None, None, None, scores[:1], indices),
        "indices must have another number": (X, Y, None, None, None, scores, indices[:1]),
    }.items():
        names = "queries", "items", "item_bias", "exclude_indptr", "exclude_indices", "scores", "indices"
        with pytest.raises(ValueError, match=message):
            call(**dict(zip(names, wrong, strict=True)))


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(NotImplementedError, match="top_k_scores: triton needs a tensor on cuda, got cpu"):
        lk.top_k_scores(X, Y, 1, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="top_k_scores: cpu needs dtype float32, bfloat16, float16"):
        scores, _ = lk.top_k_scores(X.double(), Y.double(), 1)
    assert scores.dtype == torch.float64
