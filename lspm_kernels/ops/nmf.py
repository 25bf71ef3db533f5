"""A multiplicative update of a factor of a non-negative sparse matrix."""

import numbers

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, csr_checks, dispatch, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import InPlaceOperator
from lspm_kernels.reference import nmf as reference

_INFINITY = float("inf")

_FLOATS = (torch.float32,)
_ON_A_GPU = (
    Limit("K of at most 1024", lambda factors: factors.size(1) <= 1024, lambda factors: factors.size(1)),
)
# On a GPU cuda comes first, as it divides a row of many entries among more threads: on an H200 it takes
# 0.8 to 0.9 times as long.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("nmf_update"), None, missing, limits)
    for name, device, kernel, missing, limits in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing, ()),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing, _ON_A_GPU),
        ("triton", "cuda", triton.kernel, triton.missing, _ON_A_GPU),
    )
)


def _update(row, factors, other_factors, indptr, indices, values, reg, eps):
    failed = indptr.new_full((1,), -1)
    others = (t.contiguous() for t in (other_factors, indptr, indices, values))
    row.forward(factors, *others, failed, reg, eps)
    # Kernels of a GPU report nothing: to ask would be to wait.
    if row.name == "cpu" and (no_index := failed.item()) >= 0:
        raise ValueError(f"nmf_: indices must name rows of other_factors, got another in row {no_index}")


_nmf = InPlaceOperator(
    "nmf(Tensor(a!) factors, Tensor other_factors, Tensor indptr, Tensor indices, Tensor values, float reg,"
    " float eps) -> ()",
    BACKENDS,
    _update,
)


def nmf_(
    factors: Tensor,
    other_factors: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    *,
    reg: float = 0.0,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """One multiplicative update of every row of a non-negative factor, over the observed entries, in place.

    p_f *= (sum of v y_f) / (sum of <p, y> y_f + n reg p_f + eps), over the n entries of row p, each of value
    v and row y of other_factors; <p, y> is of p as it was. It never makes sum of (v - <p, y>)^2 + n reg |p|^2
    larger, but for rounding; a 0 stays a 0, and a row without entries becomes 0. The same bits for any number
    of threads.

    Args:
        factors: (R, K), float32 or float64, contiguous, at least 0; sums are in that dtype. They change.
        other_factors: (N, K), their dtype, at least 0.
        indptr: (R + 1,), int64: the entries of row r are those from indptr[r] up to indptr[r + 1].
        indices: (nnz,), int32 or int64, from 0 to N - 1: the rows of other_factors.
        values: (nnz,), factors' dtype, at least 0.
        reg: at least 0.
        eps: positive; what stands under the fraction where all else there is 0.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        factors.

    Raises:
        ValueError: an argument is not as said above.
        NotImplementedError: the backend asked for does not take this call.

    Source: Lee and Seung, "Algorithms for Non-negative Matrix Factorization" (2001), theorem 1, over observed
    entries alone as in Luo et al., "An Efficient Non-Negative Matrix-Factorization-Based Approach to
    Collaborative Filtering for Recommender Systems" (2014).
    """
    csr_checks.factors("nmf_", factors, other_factors)
    csr_checks.entries("nmf_", factors, other_factors, indptr, indices)
    csr_checks.values("nmf_", "values", values, factors, indices.numel(), negative=False)
    for name, t in (("factors", factors), ("other_factors", other_factors)):
        csr_checks.finite("nmf_", name, t, negative=False)
    csr_checks.changed("nmf_", factors, other_factors)
    checks.number("nmf_", "reg", reg, 0, _INFINITY)
    if not isinstance(eps, numbers.Real) or not 0 < eps < _INFINITY:
        raise ValueError(f"nmf_: eps must be finite and positive, got {eps!r}")
    options = float(reg), float(eps)
    row = dispatch.pick("nmf_", BACKENDS, backend, factors)
    if row is None:
        factors.copy_(reference.nmf(factors, other_factors, indptr, indices, values, *options))
    else:
        _nmf(row, factors, other_factors, indptr, indices, values, *options)
    return factors
