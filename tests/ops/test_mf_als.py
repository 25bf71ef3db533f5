"""mf_als_ and mf_als_loss: the public functions, under every instruction set."""

import itertools
from functools import partial

import pytest
import torch
from ops.matrices import K_OF_EACH_KIND, matrix, same_for_any_number_of_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import mf_als as ops
from lspm_kernels.reference import mf_als as reference
from lspm_kernels.reference import mf_als_loss as reference_loss

EXPLICIT, IMPLICIT = {"reg": 0.5}, {"reg": 0.5, "implicit": True, "alpha": 4.0}
SOLVERS = [{"solver": "cholesky"}, {"solver": "cg", "cg_steps": 3}]
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS, ids=["cholesky", "cg"])
EACH_OBJECTIVE = pytest.mark.parametrize("options", [EXPLICIT, IMPLICIT], ids=["explicit", "implicit"])


def factors(rows, columns, k):
    return torch.randn(rows, k), torch.randn(columns, k) / k**0.5


def by_reference(indptr, indices, options, x, y, values, weight):
    """What the options say, as the reference takes it."""
    named = {"reg_exponent": float(options.get("weighted_reg", 0)), "alpha": options.get("alpha", 1.0)}
    named |= {"reg": options["reg"], "implicit": options.get("implicit", False)}
    if "solver" not in options:
        return reference_loss.mf_als_loss(x, y, indptr, indices, values, weight, **named)
    steps = options["cg_steps"] if options["solver"] == "cg" else 0
    return reference.mf_als(x, y, indptr, indices, values, weight, steps=steps, **named)


def check(x, y, indptr, indices, values, weight=None, **options):
    if "cg_steps" in options:  # as many steps as unknowns would compare what rounding leaves of nothing
        options["cg_steps"] = min(options["cg_steps"], max(1, x.size(1) - 1))

    def ours(x, y, values, weight):
        if "solver" in options:
            return lk.mf_als_(x.clone(), y, indptr, indices, values, weight=weight, **options)
        return lk.mf_als_loss(x, y, indptr, indices, values, weight=weight, **options)

    truth = partial(by_reference, indptr, indices, options)
    oracle.check(ours, truth, [x, y, values, weight], gradients=False)


@pytest.mark.every_backend
@EACH_OBJECTIVE
@EACH_SOLVER
@pytest.mark.parametrize("k", K_OF_EACH_KIND)
def test_against_the_reference(k, solver, options):
    for rows, columns, entries in ((1, 1, 1), (2, 50, 40), (40, 30, 900)):
        check(*factors(rows, columns, k), *matrix(rows, columns, entries, wide=k % 2), **solver, **options)


@pytest.mark.every_backend
@EACH_SOLVER
def test_a_large_k_and_rows_of_many_tiles(solver):
    for k in (300, 512):
        check(*factors(3, 40, k), *matrix(3, 40, 400), **solver, **IMPLICIT)
    check(*factors(4, 3000, 24), *matrix(4, 3000, 9000), **solver, **EXPLICIT)


@pytest.mark.every_backend
@EACH_SOLVER
def test_options(solver):
    x, y = factors(20, 30, 17)
    entries = matrix(20, 30, 300)
    for weighted_reg in (True, 0.5):
        for options in (EXPLICIT, IMPLICIT):
            check(x, y, *entries, weighted_reg=weighted_reg, **solver, **options)
    weight = torch.rand(300)
    weight[::7] = 0
    check(x, y, *entries, weight, **solver, **EXPLICIT)
    check(x, y, *entries[:2], None, **solver, **IMPLICIT)
    zeros = entries[2] * (torch.rand(300) < 0.5)
    check(x, y, *entries[:2], zeros, **solver, **IMPLICIT)


def test_every_instruction_set(isa):
    for k in (1, 5, 33, 72):
        given = *factors(20, 30, k), *matrix(20, 30, 500)
        for options in (EXPLICIT, IMPLICIT):
            check(*given, **options)
            for solver in SOLVERS:
                check(*given, **solver, **options)


@EACH_OBJECTIVE
def test_the_loss(options):
    x, y = factors(40, 30, 20)
    entries = matrix(40, 30, 900)
    for weighted_reg in (False, True, 0.5):
        check(x, y, *entries, weighted_reg=weighted_reg, **options)
    if options is EXPLICIT:
        check(x, y, *entries, torch.rand(900), **options)
    else:
        check(x, y, *entries[:2], None, **options)


def test_the_implicit_loss_is_that_of_the_dense_matrix():
    (x, y), (indptr, indices, _) = factors(6, 9, 4), matrix(6, 9, 12)
    rows = torch.repeat_interleave(torch.arange(6), indptr.diff())
    pairs = torch.unique(rows * 9 + indices)  # each once
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(pairs // 9, minlength=6).cumsum(0)])
    confidence, preference = torch.ones(6, 9), torch.zeros(6, 9)
    confidence.view(-1)[pairs], preference.view(-1)[pairs] = 3.0, 1.0
    expected = (confidence * (preference - x @ y.T) ** 2).sum() + 0.5 * (x.square().sum() + y.square().sum())
    loss = lk.mf_als_loss(x, y, indptr, pairs % 9, reg=0.5, implicit=True, alpha=2.0)
    torch.testing.assert_close(loss, expected)


@EACH_OBJECTIVE
@EACH_SOLVER
@pytest.mark.parametrize("weighted_reg", [False, True])
def test_no_half_sweep_makes_the_loss_larger(solver, options, weighted_reg):
    x, y = factors(30, 40, 8)
    indptr, indices, values = matrix(30, 40, 300)
    rows = torch.repeat_interleave(torch.arange(30), indptr.diff())
    order = torch.argsort(indices, stable=True)
    columns = torch.zeros(41, dtype=torch.int64)
    columns[1:] = torch.bincount(indices, minlength=40).cumsum(0)
    options = options | {"weighted_reg": weighted_reg}
    losses = [lk.mf_als_loss(x, y, indptr, indices, values, **options)]
    for _ in range(3):
        lk.mf_als_(x, y, indptr, indices, values, **solver, **options)
        losses.append(lk.mf_als_loss(x, y, indptr, indices, values, **options))
        lk.mf_als_(y, x, columns, rows[order], values[order], **solver, **options)
        losses.append(lk.mf_als_loss(x, y, indptr, indices, values, **options))
    assert all(after < before for before, after in itertools.pairwise(losses)), losses


@pytest.mark.every_backend
@EACH_OBJECTIVE
@EACH_SOLVER
def test_rows_without_entries_become_0_and_empty_tensors_are_none(solver, options):
    x, y = factors(3, 5, 7)
    empty = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert not lk.mf_als_(x, y, *empty, **solver, **options).any()
    assert lk.mf_als_(x[:0], y, empty[0][:1], *empty[1:], **solver, **options).shape == (0, 7)
    assert not lk.mf_als_(x, y[:0], *empty, **solver, **options).any()
    check(x, y, *empty, **options)


def test_a_matrix_that_is_not_positive_definite_is_an_error_that_names_its_row():
    x, y = factors(6, 20, 8)
    indptr = torch.tensor([0, 20, 40, 43, 43, 63, 65])
    indices = torch.arange(65) % 20
    values = torch.rand(65)
    before = x.clone()
    for backend, changed in ((None, [0, 1, 3, 4]), ("reference", [])):
        with pytest.raises(ValueError, match=r"^mf_als_: the matrix of every row .* got row 2's: raise reg$"):
            lk.mf_als_(x, y, indptr, indices, values, reg=0.0, backend=backend)
        assert (x != before).any(1).nonzero().flatten().tolist() == changed and x.isfinite().all()
        x.copy_(before)
    y[:, 7] = y[:, 6]  # as many entries as K, of a smaller rank
    with pytest.raises(ValueError, match="got row 0's"):
        lk.mf_als_(x, y, indptr, indices, values, reg=0.0)
    assert lk.mf_als_(x, y, indptr, indices, values, reg=0.0, solver="cg").isfinite().all()
    x.copy_(before)
    assert lk.mf_als_(x, y, indptr, indices, values, reg=1e-3).isfinite().all()


@pytest.mark.every_backend
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_huge_and_tiny_values(scale):
    (x, y), (indptr, indices, values) = factors(9, 20, 5), matrix(9, 20, 200)
    check(x, y, indptr, indices, values * scale, solver="cholesky", **EXPLICIT)
    check(x * 0, y, indptr, indices, values * scale, solver="cg", cg_steps=2, **EXPLICIT)


@pytest.mark.every_backend
@pytest.mark.parametrize("backend", [None, "reference"])
def test_steps_beyond_the_last_that_gains_change_nothing_much(backend):
    """A row of one entry has all it can have after one step; what is left of it is rounding."""
    (x, y), entries = factors(16, 40, 24), (torch.arange(17), torch.arange(16), torch.rand(16) + 1)
    steps = {"solver": "cg", "cg_steps": 400, "backend": backend}
    named, values = y[:16].double(), entries[2].double()
    nearest = x + ((values - (x * named).sum(1)) / named.square().sum(1))[:, None] * named
    found = lk.mf_als_(x.clone(), y, *entries, reg=0.0, **steps)
    assert (found - nearest).norm(dim=1).max() <= 0.01 * nearest.norm(dim=1).max()
    for options in (EXPLICIT, IMPLICIT):
        exact = lk.mf_als_(x.clone(), y, *entries, solver="cholesky", **options)
        found = lk.mf_als_(x.clone(), y, *entries, **options, **steps)
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_a_factor_that_is_not_finite_is_never_hidden():
    (x, y), entries = (
        factors(3, 4, 5),
        (torch.tensor([0, 2, 4, 4]), torch.tensor([0, 1, 2, 3]), torch.ones(4)),
    )
    y[2, 1] = float("nan")
    with pytest.raises(ValueError, match="got row 1's"):
        lk.mf_als_(x.clone(), y, *entries, reg=1.0)
    solved = lk.mf_als_(x, y, *entries, reg=1.0, solver="cg")
    assert solved.isnan().all(1).tolist() == [False, True, False] and solved[0].isfinite().all()


@EACH_OBJECTIVE
def test_same_bits_for_any_number_of_threads(options):
    x, y = factors(300, 200, 40)
    entries = matrix(300, 200, 20000)
    for solver in SOLVERS:
        assert same_for_any_number_of_threads(
            lambda s=solver: lk.mf_als_(x.clone(), y, *entries, **s, **options)
        )
    assert same_for_any_number_of_threads(lambda: lk.mf_als_loss(x, y, *entries, **options))


def test_strides_and_dtypes():
    (x, y), (indptr, indices, values) = factors(9, 20, 6), matrix(9, 20, 200)
    expected = lk.mf_als_(x.clone(), y, indptr, indices, values, reg=1.0)
    apart = y.new_zeros(20, 12)[:, ::2].copy_(y), indptr.repeat_interleave(2)[::2]
    apart += indices.repeat_interleave(2)[::2], values.repeat_interleave(2)[::2]
    assert torch.equal(lk.mf_als_(x.clone(), *apart, reg=1.0), expected)
    assert torch.equal(lk.mf_als_(x.clone(), y, indptr, indices.long(), values, reg=1.0), expected)
    wide = x.double(), y.double(), indptr, indices, values.double()
    with pytest.warns(lk.FallbackWarning, match="mf_als_: cpu needs dtype float32, got float64"):
        result = lk.mf_als_(*wide, reg=1.0)
    assert result is wide[0]
    torch.testing.assert_close(result.float(), expected)


def test_compile_opcheck_and_fake_tensors():
    (x, y), (indptr, indices, values) = factors(9, 20, 6), matrix(9, 20, 200)
    given = y, indptr, indices, values
    expected = lk.mf_als_(x.clone(), *given, reg=1.0)
    loss = lk.mf_als_loss(expected, *given, reg=1.0)

    def both(x):
        solved = lk.mf_als_(x.clone(), *given, reg=1.0)
        return solved, lk.mf_als_loss(solved, *given, reg=1.0)

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found[0], expected) and torch.equal(found[1], loss)
    ops = torch.ops.lspm
    torch.library.opcheck(ops.mf_als.default, (x, *given, None, 1.0, 0.0, 1.0, False, 0, "cpu"))
    torch.library.opcheck(ops.mf_als_loss.default, (x, *given, None, 1.0, 0.0, 1.0, False, "cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, *given)]
        assert lk.mf_als_(*fake, reg=1.0) is fake[0]
        assert lk.mf_als_loss(*fake, reg=1.0).shape == ()


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    assert [row.name for row in ops.LOSS_BACKENDS] == ["cpu", "cuda", "triton"]
