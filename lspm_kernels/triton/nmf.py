"""A multiplicative update of a non-negative factor; the contract is that of csrc/nmf.h.

A program owns a row: it gathers the row's y tile by tile, and each adds to both sums in order while it is in
registers. Bytes: 4 K for each entry, from the cache where other_factors fits there.
"""

import torch
import triton
import triton.language as tl

_TILE = 512  # elements: 16 a thread of one warp


@triton.jit
def _update_kernel(
    factors, others, indptr, indices, values, columns, k, reg, eps, ENTRIES: tl.constexpr, K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    factor = tl.arange(0, K)
    at = factors + row * k + factor
    p = tl.load(at, mask=factor < k, other=0.0)
    above, below = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        own = entry < end
        column = tl.load(indices + entry, mask=own, other=0).to(tl.int64)
        named = own & (column >= 0) & (column < columns)
        place = others + column[:, None] * k + factor[None, :]
        y = tl.load(place, mask=named[:, None] & (factor < k)[None, :], other=0.0)
        v = tl.load(values + entry, mask=own, other=0.0)
        above += tl.sum(y * v[:, None], 0)
        below += tl.sum(y * tl.sum(y * p[None, :], 1)[:, None], 0)
    below += (end - begin).to(tl.float32) * reg * p + eps
    tl.debug_barrier()  # warps that hold the same elements have all read them
    tl.store(at, p * above / below, mask=factor < k)


def update(factors, other_factors, indptr, indices, values, failed, reg, eps):
    """Updates every row of factors. An index that is none counts as a row of zeros."""
    rows, k = factors.shape
    if not rows:
        return
    width = max(triton.next_power_of_2(k), 16)
    with torch.cuda.device_of(factors):
        _update_kernel[(rows,)](
            factors, other_factors, indptr, indices, values, len(other_factors), k, reg, eps,
            ENTRIES=max(1, _TILE // width), K=width, num_warps=1,
        )  # fmt: skip
