"""Alternating least squares by conjugate gradient; the contract is that of csrc/mf_als.h, with steps of 1 on.

A program owns a row: x, r and p stay in registers, and each step gathers the row's y tile by tile, adds
their part of the product with the matrix in order, and reads Y'Y once, which the launcher has made. Bytes a
step: 4 K for each entry, from the cache where other_factors fits there. The loss: a program owns a row, whose
terms it adds up tile by tile; the launcher adds up the rows', in an order that torch does not change.
"""

import torch
import triton
import triton.language as tl

# As csrc/mf_als.h has them: where steps of conjugate gradient stop.
_EPSILON, _LOST = tl.constexpr(2.0**-23), tl.constexpr(2.0**-103)
_TILE = 2048  # elements: 16 a thread, with 4 warps
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _product(
    p, others, indices, values, weight, begin, end, columns, k, alpha,
    REST: tl.constexpr, IMPLICIT: tl.constexpr, ENTRIES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sum of w <y, p> y over the row's entries; REST: the right side minus that."""
    factor = tl.arange(0, K)[None, :]
    total = tl.zeros((K,), tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        own = entry < end
        column = tl.load(indices + entry, mask=own, other=0).to(tl.int64)
        named = own & (column >= 0) & (column < columns)
        y = tl.load(others + column[:, None] * k + factor, mask=named[:, None] & (factor < k), other=0.0)
        v = tl.full((ENTRIES,), 1.0, tl.float32)
        if values is not None:
            v = tl.load(values + entry, mask=own, other=0.0)
        w = tl.full((ENTRIES,), 1.0, tl.float32)
        if IMPLICIT:
            w, side = alpha * v, 1.0 + alpha * v
        else:
            if weight is not None:
                w = tl.load(weight + entry, mask=own, other=0.0)
            side = w * v
        scale = w * tl.sum(y * p[None, :], 1)
        if REST:
            scale = side - scale
        total += tl.sum(y * scale[:, None], 0)
    return total


@triton.jit
def _times_gram(p, gram, k, K: tl.constexpr):
    down, across = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    tile = tl.load(gram + down * k + across, mask=(down < k) & (across < k), other=0.0)
    return tl.sum(tile * p[:, None], 0)


@triton.jit
def _update_kernel(
    factors, others, indptr, indices, values, weight, gram, regs, columns, k, alpha, steps,
    IMPLICIT: tl.constexpr, ENTRIES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    factor = tl.arange(0, K)
    at = factors + row * k + factor
    x = tl.load(at, mask=factor < k, other=0.0)
    reg = tl.load(regs + row)
    r = _product(
        x, others, indices, values, weight, begin, end, columns, k, alpha, True, IMPLICIT, ENTRIES, K
    )
    r -= reg * x
    if IMPLICIT:
        r -= _times_gram(x, gram, k, K)
    p, left, steepest = r, tl.sum(r * r, 0), 0.0
    least = tl.maximum(_EPSILON * _EPSILON * left, _LOST)
    for _ in range(steps):
        q = _product(
            p, others, indices, values, weight, begin, end, columns, k, alpha, False, IMPLICIT, ENTRIES, K
        )
        q += reg * p
        if IMPLICIT:
            q += _times_gram(p, gram, k, K)
        curvature = tl.sum(p * q, 0)
        slope = curvature / tl.sum(p * p, 0)
        steepest = tl.maximum(steepest, slope)
        done = (slope <= _EPSILON * steepest) | (left < least)  # a NaN goes on
        length = tl.where(done, 0.0, left / curvature)
        x += length * p
        r -= length * q
        after = tl.where(done, 0.0, tl.sum(r * r, 0))
        p = r + tl.where(done, 0.0, after / left) * p
        left = after
    tl.debug_barrier()  # warps that hold the same elements have all read them
    tl.store(at, tl.where(begin < end, x, 0.0), mask=factor < k)


def update(
    factors, other_factors, indptr, indices, values, weight, failed, reg, reg_exponent, alpha, implicit, steps
):
    """Takes `steps` steps for every row of factors. An index that is none counts as a row of zeros."""
    rows, k = factors.shape
    if not rows:
        return
    width = max(triton.next_power_of_2(k), 16)
    with torch.cuda.device_of(factors):
        gram = other_factors.T @ other_factors if implicit else other_factors
        regs = reg * indptr.diff().to(torch.float32) ** reg_exponent
        _update_kernel[(rows,)](
            factors, other_factors, indptr, indices, values, weight, gram, regs, len(other_factors), k, alpha,
            steps, IMPLICIT=implicit, ENTRIES=_TILE // width, K=width, num_warps=4 if width < 128 else 8,
        )  # fmt: skip


@triton.jit
def _loss_kernel(
    factors, others, indptr, indices, values, weight, terms, columns, k, alpha,
    IMPLICIT: tl.constexpr, ENTRIES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    factor = tl.arange(0, K)
    x = tl.load(factors + row * k + factor, mask=factor < k, other=0.0)
    total = tl.zeros((ENTRIES,), tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        own = entry < end
        column = tl.load(indices + entry, mask=own, other=0).to(tl.int64)
        named = own & (column >= 0) & (column < columns)
        y = tl.load(
            others + column[:, None] * k + factor[None, :],
            mask=named[:, None] & (factor < k)[None, :],
            other=0.0,
        )
        product = tl.sum(y * x[None, :], 1)
        v = tl.full((ENTRIES,), 1.0, tl.float32)
        if values is not None:
            v = tl.load(values + entry, mask=own, other=0.0)
        if IMPLICIT:
            away = 1.0 - product
            term = (1.0 + alpha * v) * away * away - product * product
        else:
            away = v - product
            term = away * away
            if weight is not None:
                term *= tl.load(weight + entry, mask=own, other=0.0)
        term = tl.where(named, term, float("nan"))
        total += tl.where(own, term, 0.0)
    tl.store(terms + row, tl.sum(total, 0))


def _squares(factors, counts, reg, reg_exponent):
    """The sum of l |x|^2, where counts gives the entries of each row."""
    squares = torch.linalg.vector_norm(factors, dim=1).double().square()
    return reg * (squares if reg_exponent == 0 else counts.double() ** reg_exponent * squares).sum()


def loss(factors, other_factors, indptr, indices, values, weight, out, reg, reg_exponent, alpha, implicit):
    """Puts the objective into out: NaN where an index is none."""
    (rows, k), columns = factors.shape, len(other_factors)
    width = max(triton.next_power_of_2(k), 16)
    terms = factors.new_empty(rows)
    with torch.cuda.device_of(factors):
        if rows:
            _loss_kernel[(rows,)](
                factors, other_factors, indptr, indices, values, weight, terms, columns, k, alpha,
                IMPLICIT=implicit, ENTRIES=_TILE // width, K=width, num_warps=4, **_EXACT,
            )  # fmt: skip
        total = terms.sum(dtype=torch.float64) + _squares(factors, indptr.diff(), reg, reg_exponent)
        counts = None
        if reg_exponent != 0:  # of integers, whose sum has no order; where one is none, the loss is NaN
            places = indices.long()
            places = torch.where((places >= 0) & (places < columns), places, columns)
            counts = indptr.new_zeros(columns + 1).scatter_add_(0, places, torch.ones_like(places))[:-1]
        total += _squares(other_factors, counts, reg, reg_exponent)
        if implicit:  # <x, y> ** 2 over all rows and columns: the trace of X'X Y'Y
            grams = factors.T @ factors, other_factors.T @ other_factors
            total += (grams[0].double() * grams[1]).sum()
        out.copy_(total)
