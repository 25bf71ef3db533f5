"""Bayesian personalised ranking, a launch for each diagonal of the Latin square.

A program is one warp and owns a block of pairs, whose rows no other program of its launch has: it takes them
one by one, three rows in registers, in the order of csrc/bpr.h. Bytes of a pair: 24 for each factor, and 28.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.hashing import random_bits

_DRAWS = tl.constexpr(8)  # as csrc/bpr.h


@triton.jit
def _has_seen(seen, first, last, item):
    """Whether item is among seen[first:last], which ascend."""
    end = last
    while first < last:
        middle = (first + last) // 2
        below = tl.load(seen + middle) < item
        first = tl.where(below, middle + 1, first)
        last = tl.where(below, last, middle)
    return (first < end) & (tl.load(seen + first, mask=first < end, other=-1) == item)


@triton.jit(do_not_specialize=["step", "grid", "num_users", "num_items", "seed"])
def _bpr_kernel(
    user_factors, item_factors, item_bias, users, items, offsets, part_items, part_offsets, seen_indptr, seen,
    loss, skipped, step, grid, num_users, num_items, factors, seed, lr, l2_user, l2_item, l2_bias,
    COLS: tl.constexpr,
):  # fmt: skip
    block = step * grid + tl.program_id(0)
    part = (tl.program_id(0) + step) % grid
    first = tl.load(part_offsets + part)
    size = tl.load(part_offsets + part + 1) - first
    k = tl.arange(0, COLS)
    total = 0.0
    without = 0
    for n in range(tl.load(offsets + block), tl.load(offsets + block + 1)):
        u, i = tl.load(users + n).to(tl.int64), tl.load(items + n).to(tl.int64)
        valid = (u >= 0) & (u < num_users) & (i >= 0) & (i < num_items)
        j = i
        attempt = 0
        while (attempt < _DRAWS) & (j == i) & valid & (size > 0):
            at = first + ((random_bits(seed, n * _DRAWS + attempt) * size) >> 32)
            j = tl.load(part_items + at).to(tl.int64)
            if seen is not None:
                mine = tl.load(seen_indptr + u)
                if _has_seen(seen, mine, tl.load(seen_indptr + u + 1), j):
                    j = i
            attempt += 1
        found = valid & (j != i)
        without += tl.where(valid & (j == i), 1, 0)
        inside = (k < factors) & found
        p = tl.load(user_factors + u * factors + k, mask=inside, other=0.0)
        q = tl.load(item_factors + i * factors + k, mask=inside, other=0.0)
        r = tl.load(item_factors + j * factors + k, mask=inside, other=0.0)
        x = tl.sum(p * (q - r), 0)
        b = 0.0
        c = 0.0
        if item_bias is not None:
            b = tl.load(item_bias + i, mask=found, other=0.0)
            c = tl.load(item_bias + j, mask=found, other=0.0)
            x += b - c
        g = lr / (1.0 + tl.exp(x))
        tl.debug_barrier()  # several threads read an element, and one writes it
        tl.store(user_factors + u * factors + k, p + (g * (q - r) - lr * l2_user * p), mask=inside)
        tl.store(item_factors + i * factors + k, q + (g * p - lr * l2_item * q), mask=inside)
        tl.store(item_factors + j * factors + k, r - (g * p + lr * l2_item * r), mask=inside)
        if item_bias is not None:
            tl.store(item_bias + i, b + (g - lr * l2_bias * b), mask=found)
            tl.store(item_bias + j, c - (g + lr * l2_bias * c), mask=found)
        total += tl.where(found, tl.maximum(-x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))), 0.0)
        tl.debug_barrier()  # the next pair may be of the same rows
    tl.store(loss + block, total)
    tl.store(skipped + block, without)


def update(
    user_factors, item_factors, item_bias, users, items, offsets, part_items, part_offsets,
    seen_indptr, seen, loss, skipped, step, seed,
):  # fmt: skip
    """One pass over pairs; the contract is that of csrc/bpr.h, whose step is a list of four numbers."""
    grid = round((offsets.numel() - 1) ** 0.5)
    num_users, factors = user_factors.shape
    num_items = item_factors.shape[0]
    cols = triton.next_power_of_2(factors)
    with torch.cuda.device_of(user_factors):
        for diagonal in range(grid):
            _bpr_kernel[(grid,)](
                user_factors, item_factors, item_bias, users, items, offsets, part_items, part_offsets,
                seen_indptr, seen, loss, skipped, diagonal, grid, num_users, num_items, factors, seed, *step,
                COLS=cols, num_warps=1,
            )  # fmt: skip
