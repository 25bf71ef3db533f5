"""The gradient of an embedding bag's table and an optimizer's step with it, row by row and in place.

The places of a row are summed as bags.py says, and the program that has a row's sum changes the row at once:
so a row changes once, and no gradient is stored but the parts of rows that stand in more than one chunk. A
program owns a block of a row's columns; under Adagrad, whose step takes the whole gradient, all of them.

Bytes: a row of dout for each index, and each row that stands in bags and its state twice; an int64 of an
index is sorted beside its place.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.bags import (
    CHUNK,
    begins_at,
    has_gradient,
    last_row_of,
    sorted_terms,
    sum_of_part,
    sum_of_parts,
    tile_of,
)
from lspm_kernels.triton.hashing import rounded_at_random

_ADAGRAD, _ADAM = 1, 2  # as csrc/embedding_bag_update.h numbers them
_WHOLE_ROW = {"most": 1024}
_WORDS = {"least": 64}  # columns that 16 counters have words for


@triton.jit
def _change(
    weight, first_state, second_state, g, row, first, dim, lr, eps, grow1, grow2, root, weight_decay, seed,
    OPTIMIZER: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The step of some columns of a row, from `first` on, by their gradient."""
    d = first + tl.arange(0, DIM)
    inside, at = d < dim, row * dim + d
    old = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if weight_decay is not None:
        g += weight_decay * old
    if OPTIMIZER == 0:
        new = old - lr * g
    elif OPTIMIZER == 1:
        squares = tl.load(first_state + row) + tl.sum(g * g, 0) / dim
        new = old - lr * g / (tl.sqrt_rn(squares) + eps)
    else:
        mean = tl.load(first_state + at, mask=inside, other=0.0)
        square = tl.load(second_state + at, mask=inside, other=0.0)
        mean += grow1 * (g - mean)
        square += grow2 * (g * g - square)
        new = old - lr * mean / (tl.sqrt_rn(square) * root + eps)
    if seed is not None:
        new = rounded_at_random(new, seed, row, first, DIM)
    tl.debug_barrier()  # several threads read an element, and one of them writes it
    if OPTIMIZER == 1:
        tl.store(first_state + row, squares)
    if OPTIMIZER == 2:
        tl.store(first_state + at, mean, mask=inside)
        tl.store(second_state + at, square, mask=inside)
    tl.store(weight + at, new.to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "count", "padding_idx", "seed"])
def _parts_kernel(
    dout, ordered, order, bag_of, scales, shares, parts, weight, first_state, second_state,
    rows, dim, count, padding_idx, lr, eps, grow1, grow2, root, weight_decay, seed,
    OPTIMIZER: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * DIM
    d = column + tl.arange(0, DIM)
    row = tl.load(ordered + first).to(tl.int64)
    begins = begins_at(ordered, first, row)
    if (begins | (first % CHUNK == 0)) & has_gradient(row, rows, padding_idx):
        sums, goes_on = sum_of_part(
            dout, ordered, order, bag_of, scales, shares, first, row, dim, count, d, CHUNK, ENTRIES, DIM
        )
        if begins & ~goes_on:
            _change(
                weight, first_state, second_state, sums, row, column, dim,
                lr, eps, grow1, grow2, root, weight_decay, seed, OPTIMIZER, DIM,
            )  # fmt: skip
        else:
            part = 2 * (first // CHUNK) + begins.to(tl.int64)
            tl.store(parts + part * dim + d, sums, mask=d < dim)


@triton.jit(do_not_specialize=["rows", "padding_idx", "seed"])
def _rows_kernel(
    parts, ordered, ends, weight, first_state, second_state,
    rows, dim, padding_idx, lr, eps, grow1, grow2, root, weight_decay, seed,
    OPTIMIZER: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * DIM
    d = column + tl.arange(0, DIM)
    row, end, begins = last_row_of(chunk, ordered, ends, CHUNK)
    if begins & (end > (chunk + 1) * CHUNK) & has_gradient(row, rows, padding_idx):
        sums = sum_of_parts(parts, chunk, end, dim, d, CHUNK, ENTRIES, DIM)
        _change(
            weight, first_state, second_state, sums, row, column, dim,
            lr, eps, grow1, grow2, root, weight_decay, seed, OPTIMIZER, DIM,
        )  # fmt: skip


def update(
    weight, first, second, dout, indices, offsets, per_sample_weights, padding_idx, mean, optimizer, numbers,
    step, seed,
):  # fmt: skip
    """Changes each row that stands in a bag, once; the contract is that of csrc/embedding_bag_update.h.

    But nothing is checked: an index that is none changes no row.
    """
    (rows, dim), count = weight.shape, indices.numel()
    if not (weight.numel() and count):
        return
    lr, eps, beta1, beta2, weight_decay = numbers
    root = 1.0
    if optimizer == _ADAM:
        lr, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    tile = tile_of(dim, **_WHOLE_ROW if optimizer == _ADAGRAD else {}, **_WORDS if seed is not None else {})
    settings = padding_idx, lr, eps, 1 - beta1, 1 - beta2, root, weight_decay or None, seed
    kinds = {"OPTIMIZER": optimizer, "CHUNK": CHUNK, **tile}
    blocks = triton.cdiv(dim, tile["DIM"])
    with torch.cuda.device_of(weight):
        terms, parts, ends = sorted_terms(dout, indices, offsets, per_sample_weights, padding_idx, mean)
        table = weight, first, second, rows, dim
        _parts_kernel[(count, blocks)](*terms, parts, *table, count, *settings, **kinds)
        if len(ends):
            _rows_kernel[(len(ends), blocks)](parts, terms[1], ends, *table, *settings, **kinds)
