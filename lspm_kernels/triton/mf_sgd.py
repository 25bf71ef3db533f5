"""Stochastic gradient descent on a factorisation, a launch for each diagonal of the Latin square.

A program is one warp and owns a block of ratings, whose rows no other program of its launch has: it takes
them one by one, both rows in registers, in the order of csrc/mf_sgd.h. Bytes of a rating, float32: 16 for
each factor, and 28.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.hashing import random_bits


@triton.jit
def _element(table, at, valid):
    """An element of a vector, 0 where there is none."""
    x = 0.0
    if table is not None:
        x = tl.load(table + at, mask=valid, other=0.0)
    return x


@triton.jit
def _put(table, at, x, valid):
    if table is not None:
        tl.store(table + at, x, mask=valid)


@triton.jit
def _mean_square(e, other, row, l2, factors):
    """That of the gradient of a row."""
    g = e * other - l2 * row
    return tl.sum(g * g, 0) / factors


@triton.jit
def _bounded(v, shrink, NONNEGATIVE: tl.constexpr):
    moved = tl.where(v > shrink, v - shrink, tl.where(v < -shrink, v + shrink, v * 0.0))
    v = tl.where(shrink > 0, moved, v)
    if NONNEGATIVE:
        v = tl.where(v < 0, 0.0, v)
    return v


@triton.jit
def _store(table, at, v, bits, inside):
    """Rounded at random, with 16 random bits, where the table is of bfloat16."""
    if table.dtype.element_ty == tl.bfloat16:
        exact = v.to(tl.uint32, bitcast=True)
        kept = tl.where(v - v == v - v, exact + bits, exact) & 0xFFFF0000
        v = kept.to(tl.float32, bitcast=True)
    tl.store(table + at, v.to(table.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step", "grid", "num_users", "num_items", "seed"])
def _mf_sgd_kernel(
    user_factors, item_factors, user_bias, item_bias, user_squares, item_squares,
    users, items, ratings, weight, offsets, loss, step, grid, num_users, num_items, factors, seed,
    mean, lr, lr_bias, l2_user, l2_item, l2_user_bias, l2_item_bias, l1_user, l1_item,
    NONNEGATIVE: tl.constexpr, LOGISTIC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    block = step * grid + tl.program_id(0)
    k = tl.arange(0, COLS)
    total = 0.0
    for j in range(tl.load(offsets + block), tl.load(offsets + block + 1)):
        u, i = tl.load(users + j).to(tl.int64), tl.load(items + j).to(tl.int64)
        valid = (u >= 0) & (u < num_users) & (i >= 0) & (i < num_items)
        inside = (k < factors) & valid
        p = tl.load(user_factors + u * factors + k, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(item_factors + i * factors + k, mask=inside, other=0.0).to(tl.float32)
        b, c = _element(user_bias, u, valid), _element(item_bias, i, valid)
        rating = tl.load(ratings + j)
        w = 1.0 if weight is None else tl.load(weight + j)
        # The score, less the rating where only that is asked for: what is small is rounded less.
        score = tl.sum(p * q, 0) + ((mean if LOGISTIC else mean - rating) + b + c)
        if LOGISTIC:
            lost = tl.maximum(score, 0.0) - rating * score + tl.log(1.0 + tl.exp(-tl.abs(score)))
            error = rating - 1.0 / (1.0 + tl.exp(-score))
        else:
            lost = score * score
            error = -score
        total += tl.where(valid, w * lost, 0.0)
        e = w * error
        lr_u, lr_i = lr, lr
        squares_u, squares_i = _element(user_squares, u, valid), _element(item_squares, i, valid)
        if user_squares is not None:
            squares_u += _mean_square(e, q, p, l2_user, factors)
            squares_i += _mean_square(e, p, q, l2_item, factors)
            lr_u = tl.where(squares_u > 0, lr / tl.sqrt_rn(squares_u), lr)
            lr_i = tl.where(squares_i > 0, lr / tl.sqrt_rn(squares_i), lr)
        new_p = _bounded(p + (lr_u * e * q - lr_u * l2_user * p), lr_u * l1_user, NONNEGATIVE)
        new_q = _bounded(q + (lr_i * e * p - lr_i * l2_item * q), lr_i * l1_item, NONNEGATIVE)
        bits = random_bits(seed, j).to(tl.uint32) + k.to(tl.uint32) * 0x9E3779B9
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        tl.debug_barrier()  # several threads read an element, and one writes it
        _store(user_factors, u * factors + k, new_p, bits >> 16, inside)
        _store(item_factors, i * factors + k, new_q, (bits ^ (bits >> 16)) & 0xFFFF, inside)
        _put(user_bias, u, b + lr_bias * (e - l2_user_bias * b), valid)
        _put(item_bias, i, c + lr_bias * (e - l2_item_bias * c), valid)
        _put(user_squares, u, squares_u, valid)
        _put(item_squares, i, squares_i, valid)
        tl.debug_barrier()  # the next rating may be of the same rows
    tl.store(loss + block, total)


def update(
    user_factors, item_factors, user_bias, item_bias, user_squares, item_squares,
    users, items, ratings, weight, offsets, loss, step, nonnegative, logistic, seed,
):  # fmt: skip
    """One pass over ratings; the contract is that of csrc/mf_sgd.h, whose step is nine numbers.

    Args:
        user_factors, item_factors: (U, K) and (I, K), contiguous; biases, squares: float32 or None.
        users, items, ratings, weight: (n,), in the order of the blocks, which begin at offsets.
        offsets: (grid ** 2 + 1,).
        loss: (grid ** 2,) float32.
    """
    grid = round((offsets.numel() - 1) ** 0.5)
    num_users, factors = user_factors.shape
    num_items = item_factors.shape[0]
    cols = triton.next_power_of_2(factors)
    with torch.cuda.device_of(user_factors):
        for diagonal in range(grid):
            _mf_sgd_kernel[(grid,)](
                user_factors, item_factors, user_bias, item_bias, user_squares, item_squares,
                users, items, ratings, weight, offsets, loss, diagonal, grid,
                num_users, num_items, factors, seed, *step,
                NONNEGATIVE=nonnegative, LOGISTIC=logistic, COLS=cols, num_warps=1,
            )  # fmt: skip
