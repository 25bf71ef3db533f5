"""Matrix factorisation's prediction on tiles of pairs by factors.

Forward: a program owns a tile of pairs and walks their factors. Backward, once for each table: a stable sort
puts the pairs of a row side by side, and a program owns a tile of a row, which it writes once;
so each sum has one owner and one order, and there are no atomics. Bytes per pair: two rows each way.
"""

import torch
import triton
import triton.language as tl

_TILE = 1024  # elements of the forward's: 8 a thread, with 4 warps; with 16, sm_90 spills registers of some
_PAIRS = 16  # of a row that the backward takes at once
_DIM = 16, 128  # factors of a tile, at least and at most
_REGISTERS = 80  # of a thread of the backward: left to itself, ptxas saves some for sm_90 and spills
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _is_row(ids, rows):
    return (ids >= 0) & (ids < rows)


@triton.jit(do_not_specialize=["pairs"])
def _forward_kernel(
    user_factors, item_factors, user_bias, item_bias, users, items, ratings, mean, pairs, user_rows,
    item_rows, dim, PAIRS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < pairs
    user = tl.load(users + pair, mask=exists, other=0)
    item = tl.load(items + pair, mask=exists, other=0)
    known = exists & _is_row(user, user_rows) & _is_row(item, item_rows)
    total = tl.zeros((PAIRS,), tl.float32)
    for start in range(0, dim, DIM):
        d = (start + tl.arange(0, DIM))[None, :]
        inside = known[:, None] & (d < dim)
        a = tl.load(user_factors + user[:, None] * dim + d, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(item_factors + item[:, None] * dim + d, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    if user_bias is not None:
        total += tl.load(user_bias + user, mask=known, other=0.0).to(tl.float32)
    if item_bias is not None:
        total += tl.load(item_bias + item, mask=known, other=0.0).to(tl.float32)
    total = tl.where(known, total + mean, float("nan"))
    tl.store(ratings + pair, total.to(ratings.dtype.element_ty), mask=exists)


@triton.jit
def _backward_kernel(
    dratings, others, other_ids, order, begins, dfactors, dbias, other_rows, dim,
    PAIRS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    end = tl.load(begins + row + 1)
    total = tl.zeros((PAIRS, DIM), tl.float32)
    sums = tl.zeros((PAIRS,), tl.float64)  # a popular row has tens of thousands of gradients
    for start in range(tl.load(begins + row), end, PAIRS):
        at = start + tl.arange(0, PAIRS)
        exists = at < end
        pair = tl.load(order + at, mask=exists, other=0)
        gradient = tl.load(dratings + pair, mask=exists, other=0.0).to(tl.float32)
        sums += gradient.to(tl.float64)
        if dfactors is not None:
            other = tl.load(other_ids + pair, mask=exists, other=0)
            known = exists & _is_row(other, other_rows)
            inside = known[:, None] & (d < dim)[None, :]
            value = tl.load(others + other[:, None] * dim + d[None, :], mask=inside, other=0.0)
            value = tl.where((known | ~exists)[:, None], value.to(tl.float32), float("nan"))
            total += value * gradient[:, None]
    if dfactors is not None:
        gradients = tl.sum(total, 0).to(dfactors.dtype.element_ty)
        tl.store(dfactors + row * dim + d, gradients, mask=d < dim)
    if dbias is not None:
        tl.store(dbias + row, tl.sum(sums, 0).to(dbias.dtype.element_ty), mask=tl.program_id(1) == 0)


def forward(user_factors, item_factors, user_bias, item_bias, users, items, ratings, mean):
    """Ratings of pairs; the contract is that of csrc/mf.h, but that an id that is none makes NaN.

    Args:
        users, items, ratings: of one shape, contiguous.
    """
    if pairs := ratings.numel():
        dim = user_factors.shape[1]
        tile = _tile(dim)
        PAIRS = _TILE // tile
        tables = user_factors, item_factors, user_bias, item_bias, users, items, ratings
        numbers = mean, pairs, len(user_factors), len(item_factors), dim
        with torch.cuda.device_of(users):
            _forward_kernel[(triton.cdiv(pairs, PAIRS),)](*tables, *numbers, PAIRS=PAIRS, DIM=tile, **_EXACT)


def backward(
    dratings, user_factors, item_factors, users, items, duser_factors, ditem_factors, duser_bias, ditem_bias
):
    """The gradients that are not None, each written whole."""
    ids = users.view(-1), items.view(-1)
    _one_table(dratings, *ids, item_factors, duser_factors, duser_bias)
    _one_table(dratings, *reversed(ids), user_factors, ditem_factors, ditem_bias)


def _one_table(dratings, ids, other_ids, others, dfactors, dbias):
    gradient = dbias if dfactors is None else dfactors
    if gradient is None or not len(gradient):
        return
    rows, dim = len(gradient), others.shape[1]
    ordered = ids.sort(stable=True)
    begins = torch.searchsorted(ordered.values, torch.arange(rows + 1, device=ids.device))
    tile = _tile(dim)
    grid = rows, 1 if dfactors is None else max(1, triton.cdiv(dim, tile))
    given = dratings, others, other_ids, ordered.indices, begins, dfactors, dbias, len(others), dim
    with torch.cuda.device_of(ids):
        _backward_kernel[grid](*given, PAIRS=_PAIRS, DIM=tile, maxnreg=_REGISTERS, **_EXACT)


def _tile(dim):
    return min(max(triton.next_power_of_2(dim), _DIM[0]), _DIM[1])
