"""nmf_: the public function, under every instruction set; what it refuses stands in test_mf_als_errors.py."""

import itertools

import pytest
import torch
from ops.matrices import K_OF_EACH_KIND, matrix, same_for_any_number_of_threads

import lspm_kernels as lk
import oracle
from lspm_kernels.ops import nmf as ops
from lspm_kernels.reference import nmf as reference


def check(x, y, indptr, indices, values, reg=0.06, eps=1e-12):
    def ours(x, y, values):
        return lk.nmf_(x.clone(), y, indptr, indices, values, reg=reg, eps=eps)

    def truth(x, y, values):
        return reference.nmf(x, y, indptr, indices, values, reg, eps)

    oracle.check(ours, truth, [x, y, values], gradients=False)


@pytest.mark.every_backend
@pytest.mark.parametrize("k", K_OF_EACH_KIND)
def test_against_the_reference(k):
    for rows, columns, entries in ((1, 1, 1), (2, 50, 40), (40, 30, 900)):
        x, y = torch.rand(rows, k), torch.rand(columns, k)
        for reg in (0.0, 0.06):
            check(x, y, *matrix(rows, columns, entries, wide=k % 2), reg=reg)
    check(torch.rand(4, k), torch.rand(300, k), *matrix(4, 300, 5000))


def test_every_instruction_set(isa):
    for k in (1, 5, 33, 72):
        check(torch.rand(20, k), torch.rand(30, k), *matrix(20, 30, 500))


@pytest.mark.every_backend
def test_the_formula_entry_by_entry():
    """As Surprise writes it: one estimate, one numerator and one denominator for each entry and factor."""
    (indptr, indices, values), x, y = matrix(4, 5, 9), torch.rand(4, 3), torch.rand(5, 3)
    expected = torch.zeros(4, 3)
    for row in range(4):
        entries = range(indptr[row], indptr[row + 1])
        for f in range(3):
            above = sum(y[indices[e], f] * values[e] for e in entries)
            below = sum(y[indices[e], f] * (x[row] @ y[indices[e]]) for e in entries)
            below += len(entries) * 0.1 * x[row, f]
            expected[row, f] = x[row, f] * above / below if len(entries) > 0 else 0
    torch.testing.assert_close(lk.nmf_(x, y, indptr, indices, values, reg=0.1), expected)


def test_no_update_makes_the_objective_larger():
    x, y = torch.rand(30, 6), torch.rand(40, 6)
    indptr, indices, values = matrix(30, 40, 400)
    rows = torch.repeat_interleave(torch.arange(30), indptr.diff())
    losses = []
    for _ in range(10):
        counts = indptr.diff()[:, None]
        error = (values - (x[rows] * y[indices]).sum(1)).square().sum()
        losses.append(error + 0.1 * (counts * x * x).sum())
        lk.nmf_(x, y, indptr, indices, values, reg=0.1)
        assert (x >= 0).all()
    assert all(after < before for before, after in itertools.pairwise(losses)), losses


@pytest.mark.every_backend
def test_zeros():
    indptr, indices = torch.tensor([0, 2, 4, 4, 6]), torch.tensor([0, 1, 0, 1, 2, 2])
    x, y, values = torch.rand(4, 5), torch.rand(3, 5), torch.rand(6)
    x[1], y[2], x[0, 3] = 0, 0, 0
    out = lk.nmf_(x.clone(), y, indptr, indices, values)
    assert out.isfinite().all() and not out[1:].any() and out[0, 3] == 0 and (out[0] > 0).sum() == 4
    check(x, y, indptr, indices, values * 0)
    empty = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert lk.nmf_(x[:0], y, *empty).shape == (0, 5)


def test_same_bits_for_any_number_of_threads():
    x, y, entries = torch.rand(300, 40), torch.rand(200, 40), matrix(300, 200, 20000)
    assert same_for_any_number_of_threads(lambda: lk.nmf_(x.clone(), y, *entries, reg=0.1))


def test_eps_may_be_an_integer():
    (indptr, indices, values), x, y = matrix(4, 5, 9), torch.rand(4, 3), torch.rand(5, 3)
    found = [lk.nmf_(x.clone(), y, indptr, indices, values, eps=eps) for eps in (1, 1.0)]
    assert torch.equal(*found)


def test_strides_and_dtypes():
    x, y, (indptr, indices, values) = torch.rand(9, 6), torch.rand(20, 6), matrix(9, 20, 200)
    expected = lk.nmf_(x.clone(), y, indptr, indices, values)
    apart = y.new_zeros(20, 12)[:, ::2].copy_(y), indptr, indices.long(), values.repeat_interleave(2)[::2]
    assert torch.equal(lk.nmf_(x.clone(), *apart), expected)
    wide = x.double(), y.double(), indptr, indices, values.double()
    with pytest.warns(lk.FallbackWarning, match="nmf_: cpu needs dtype float32, got float64"):
        result = lk.nmf_(*wide)
    assert result is wide[0]
    torch.testing.assert_close(result.float(), expected)


def test_compile_and_opcheck():
    x, given = torch.rand(9, 6), (torch.rand(20, 6), *matrix(9, 20, 200))
    function = torch.compile(lambda x: lk.nmf_(x.clone(), *given), fullgraph=True, backend="aot_eager")
    assert torch.equal(function(x), lk.nmf_(x.clone(), *given))
    torch.library.opcheck(torch.ops.lspm.nmf.default, (x, *given, 0.1, 1e-12, "cpu"))


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
