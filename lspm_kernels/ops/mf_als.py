"""Alternating least squares: a factor of a sparse matrix solved for, given the other one."""

import numbers

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, csr_checks, dispatch, mf_als_grams, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import InPlaceOperator, Operator
from lspm_kernels.reference import mf_als as reference
from lspm_kernels.reference import mf_als_loss as reference_loss

_INFINITY = float("inf")
_SOLVERS = ("cholesky", "cg")

_FLOATS = (torch.float32,)
# A block of CUDA threads holds a row's matrix in registers, which Cholesky's runs out of before 256.
_ON_CUDA = (
    Limit(
        'K of at most 248, or 512 with solver="cg"',
        lambda factors, steps: factors.size(1) <= (512 if steps else 248),
        lambda factors, steps: factors.size(1),
    ),
)
# A program of Triton holds Y'Y's columns in registers; a triangular solve of its own would leave it idle.
_ON_TRITON = (
    Limit('solver="cg"', lambda factors, steps: steps > 0, lambda factors, steps: '"cholesky"'),
    Limit(
        "K of at most 128",
        lambda factors, steps: factors.size(1) <= 128,
        lambda factors, steps: factors.size(1),
    ),
)
_LOSS_ON_A_GPU = (
    Limit("K of at most 1024", lambda factors: factors.size(1) <= 1024, lambda factors: factors.size(1)),
)
BACKENDS = (
    Backend("cpu", "cpu", _FLOATS, compiled.cpu_kernel("mf_als_update"), None, compiled.nothing_missing),
    # Before triton, as it divides a row of many entries among more threads: predicted, not measured.
    Backend("cuda", "cuda", _FLOATS, mf_als_grams.mf_als_update, None, compiled.cuda_missing, _ON_CUDA),
    Backend("triton", "cuda", _FLOATS, triton.kernel("mf_als_update"), None, triton.missing, _ON_TRITON),
)
LOSS_BACKENDS = (
    Backend("cpu", "cpu", _FLOATS, compiled.cpu_kernel("mf_als_loss"), None, compiled.nothing_missing),
    Backend("cuda", "cuda", _FLOATS, mf_als_grams.mf_als_loss, None, compiled.cuda_missing, _LOSS_ON_A_GPU),
    Backend("triton", "cuda", _FLOATS, triton.kernel("mf_als_loss"), None, triton.missing, _LOSS_ON_A_GPU),
)


def _contiguous(*tensors):
    return (None if t is None else t.contiguous() for t in tensors)


def _update(row, factors, other_factors, indptr, indices, values, weight, *options):
    others = _contiguous(other_factors, indptr, indices, values, weight)
    failed = indptr.new_full((2,), -1)
    row.forward(factors, *others, failed, *options)
    if row.name != "cpu":  # whose kernels report nothing: to ask would be to wait
        return
    no_index, not_definite = failed.tolist()
    if no_index >= 0:
        raise ValueError(f"mf_als_: indices must name rows of other_factors, got another in row {no_index}")
    if not_definite >= 0:
        raise ValueError(reference.not_definite(not_definite))


def _loss(row, factors, other_factors, *entries_and_options, saves=True):
    loss = factors.new_empty(())
    if row is not None:
        entries, options = entries_and_options[:4], entries_and_options[4:]
        row.forward(*_contiguous(factors, other_factors, *entries), loss, *options)
    return loss


def _gradient(ctx, dloss):
    raise NotImplementedError('mf_als_loss: backend must be "reference" for a gradient, got a kernel')


_als = InPlaceOperator(
    "mf_als(Tensor(a!) factors, Tensor other_factors, Tensor indptr, Tensor indices, Tensor? values,"
    " Tensor? weight, float reg, float reg_exponent, float alpha, bool implicit, int steps) -> ()",
    BACKENDS,
    _update,
)
_als_loss = Operator(
    "mf_als_loss(Tensor factors, Tensor other_factors, Tensor indptr, Tensor indices, Tensor? values,"
    " Tensor? weight, float reg, float reg_exponent, float alpha, bool implicit) -> Tensor",
    LOSS_BACKENDS,
    _loss,
    backward=_gradient,
)


def _checked(op, factors, other_factors, indptr, indices, values, weight, reg, alpha, implicit, weighted_reg):
    """The arguments that both functions have, as their kernels take them."""
    csr_checks.factors(op, factors, other_factors)
    csr_checks.entries(op, factors, other_factors, indptr, indices)
    checks.number(op, "reg", reg, 0, _INFINITY)
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < _INFINITY:
        raise ValueError(f"{op}: alpha must be finite and positive, got {alpha!r}")
    checks.number(op, "weighted_reg", weighted_reg, 0, _INFINITY)
    if values is None and not implicit:
        raise ValueError(f"{op}: values must be a tensor unless implicit, got None")
    if weight is not None and implicit:
        raise ValueError(f"{op}: weight must be None where implicit, whose values are weights, got a tensor")
    for name, t, negative in (("values", values, not implicit), ("weight", weight, False)):
        if t is not None:
            csr_checks.values(op, name, t, factors, indices.numel(), negative=negative)
    tensors = factors, other_factors, indptr, indices, values, weight
    return tensors, (float(reg), float(weighted_reg), float(alpha), bool(implicit))


def mf_als_(
    factors: Tensor,
    other_factors: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None = None,
    *,
    reg: float,
    implicit: bool = False,
    alpha: float = 1.0,
    weighted_reg: bool | float = False,
    solver: str = "cholesky",
    cg_steps: int = 3,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Half a sweep of alternating least squares: solves for every row of factors, in place.

    Explicit, row x minimises sum of w (v - <x, y>)^2 + l |x|^2 over its entries, each of value v, weight w
    and row y of other_factors: (sum of w y y' + l I) x = sum of w v y. Implicit, over all rows y of
    other_factors, with the preference 1 and the confidence 1 + alpha v of an entry, 0 and 1 of everything
    else: (Y'Y + sum of alpha v y y' + l I) x = sum of (1 + alpha v) y. l = reg * n ** weighted_reg for n
    entries. A row without entries becomes 0. The same bits for any number of threads.

    Args:
        factors: (R, K), float32 or float64, contiguous; sums are in that dtype. They change.
        other_factors: (N, K), their dtype.
        indptr: (R + 1,), int64: the entries of row r are those from indptr[r] up to indptr[r + 1].
        indices: (nnz,), int32 or int64, from 0 to N - 1: the rows of other_factors. A pair that stands twice
            counts twice.
        values: (nnz,), factors' dtype; implicit, at least 0, and None for ones.
        reg: at least 0.
        weighted_reg: the exponent of a row's number of entries; True for 1, as in Zhou et al.
        solver: "cholesky", or "cg": cg_steps steps of conjugate gradient from the factors as they are, for
            far fewer operations where rows have more than a few entries.
        weight: (nnz,), at least 0, or None for ones; explicit only.
        backend: "cpu", "cuda" (K of at most 248, by conjugate gradient 512), "triton" (by conjugate gradient,
            K of at most 128) or "reference"; None takes the first that admits the call.

    Returns:
        factors.

    Raises:
        ValueError: an argument is not as said above; what a tensor holds is looked at where it can be read,
            and an index that is none is never followed. Or "cholesky" met a matrix that is not positive
            definite to the dtype's precision, as where reg is 0 and a row has fewer entries than K: the
            message names the first such row, which stays as it was, while others may have changed; on
            "cuda", for which nothing waits, every such row becomes NaN instead. "cg" takes any: it stops
            where there is nothing to gain.
        NotImplementedError: the backend asked for does not take this call.

    Source: Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (2008), equation
    4; Zhou et al., "Large-Scale Parallel Collaborative Filtering for the Netflix Prize" (2008), section 3.1;
    Takacs, Pilaszy and Tikk, "Applications of the Conjugate Gradient Method for Implicit Feedback
    Collaborative Filtering" (2011).
    """
    matrix = factors, other_factors, indptr, indices, values, weight
    tensors, options = _checked("mf_als_", *matrix, reg, alpha, implicit, weighted_reg)
    csr_checks.changed("mf_als_", factors, other_factors)
    checks.one_of("mf_als_", "solver", solver, _SOLVERS)
    checks.integer("mf_als_", "cg_steps", cg_steps, 1)
    steps = cg_steps if solver == "cg" else 0
    row = dispatch.pick("mf_als_", BACKENDS, backend, factors, steps)
    if row is None:
        factors.copy_(reference.mf_als(*tensors, *options, steps))
    else:
        _als(row, *tensors, *options, steps)
    return factors


def mf_als_loss(
    factors: Tensor,
    other_factors: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None = None,
    *,
    reg: float,
    implicit: bool = False,
    alpha: float = 1.0,
    weighted_reg: bool | float = False,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What half sweeps of mf_als_ over rows and over columns both make smaller.

    Explicit: sum of w (v - <x, y>)^2 over the entries; implicit: sum of c (p - <x, y>)^2 over all pairs of
    rows, of which only the entries are visited, as <x, y>^2 adds up to the trace of X'X Y'Y. Either way plus
    the sum of l |x|^2 and l |y|^2, with a row's or a column's own l. The same bits for any number of threads.

    Args: as mf_als_ has them.

    Returns:
        A tensor of no dimensions, factors' dtype. It has a gradient on "reference" only.

    Raises:
        ValueError: an argument is not as said above.
        NotImplementedError: the backend asked for does not take this call.

    Source: Hu, Koren and Volinsky (2008), equation 3.
    """
    matrix = factors, other_factors, indptr, indices, values, weight
    tensors, options = _checked("mf_als_loss", *matrix, reg, alpha, implicit, weighted_reg)
    row = dispatch.pick("mf_als_loss", LOSS_BACKENDS, backend, factors)
    if row is None:
        return reference_loss.mf_als_loss(*tensors, *options)
    return _als_loss(row, *tensors, *options)
