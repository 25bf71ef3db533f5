"""Embeddings of tokens: a program owns a row of the output, whose sum and norm stay in its registers.

Without a norm a row that is wide is divided into blocks of columns. Where rows are a multiple of 64
elements, dropout draws a counter once for four of them, else for each. Bytes: a row of each table and one of
the output.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.dropout import dropped, threshold
from lspm_kernels.triton.hashing import word_of, words_of

_LEAST, _MOST = 64, 2048  # columns of a block: a counter's words, and 16 elements for each of 128 threads
_ELEMENTS, _WARPS = 8, 32  # of a thread, and at most
_EXACT = {"enable_fp_fusion": False}  # as layer_norm.py has it


@triton.jit
def _row(table, ids, row, rows, dim, col, first, length):
    """Columns of the row of a table that a row of the output takes; NaN where there is no such row."""
    if ids is None:
        own = first + row % length
    else:
        own = tl.load(ids + row).to(tl.int64)
    known = (own >= 0) & (own < rows)
    value = tl.load(table + own * dim + col, mask=known & (col < dim), other=0.0).to(tl.float32)
    return tl.where(known, value, float("nan"))


@triton.jit(
    do_not_specialize=[
        "first", "length", "rows", "token_rows", "position_rows", "type_rows", "seed", "threshold",
    ]
)  # fmt: skip
def _forward_kernel(
    tokens, weight, positions, position_weight, token_types, token_type_weight, norm_weight, norm_bias, out,
    statistics, rows, token_rows, position_rows, type_rows, dim, first, length, eps, seed, threshold, scale,
    ALIGNED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * COLS
    col = begin + tl.arange(0, COLS)
    if seed is not None:  # drawn behind the sums, words of 16384 columns would spill on sm_100
        if ALIGNED:
            drawn = words_of(seed, row * 0, row * dim + begin, COLS)
        else:
            drawn = word_of(seed, row * dim + col)
    value = _row(weight, tokens, row, token_rows, dim, col, first, length)
    if position_weight is not None:
        value += _row(position_weight, positions, row, position_rows, dim, col, first, length)
    if token_type_weight is not None:
        value += _row(token_type_weight, token_types, row, type_rows, dim, col, first, length)
    if norm_weight is not None:
        value = value.to(out.dtype.element_ty).to(tl.float32)
        mean = tl.sum(tl.where(col < dim, value, 0.0), 0) / dim
        value = tl.where(col < dim, value - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
        tl.store(statistics + row, mean)
        tl.store(statistics + rows + row, rstd)
        value = value * rstd * tl.load(norm_weight + col, mask=col < dim, other=0.0).to(tl.float32)
        if norm_bias is not None:
            value += tl.load(norm_bias + col, mask=col < dim, other=0.0).to(tl.float32)
    if seed is not None:
        value = dropped(value, drawn, threshold, scale)
    tl.store(out + row * dim + col, value.to(out.dtype.element_ty), mask=col < dim)


def forward(
    tokens, weight, positions, position_weight, token_types, token_type_weight, norm_weight, norm_bias, out,
    statistics, first, length, eps, p, scale, seed,
):  # fmt: skip
    """The contract is that of csrc/embedding.h, but that nothing is checked: an id that is none makes NaN.

    Args:
        tokens, positions, token_types: (rows,), of one dtype; positions None: first + row % length.
        weight, position_weight, token_type_weight: tables of `dim` columns; None but for the first.
        norm_weight, norm_bias: (dim,), or None.
        out: (rows, dim).
        statistics: (2, rows) float32, mean and rstd; None without a norm.
    """
    rows, dim = tokens.numel(), weight.shape[1]
    tables = (0 if t is None else len(t) for t in (weight, position_weight, token_type_weight))
    most = triton.next_power_of_2(dim) if norm_weight is not None else _MOST
    cols = min(max(triton.next_power_of_2(dim), _LEAST), max(most, _LEAST))
    drops = (seed, threshold(p), scale) if p else (None, None, None)
    with torch.cuda.device_of(weight):
        _forward_kernel[rows, triton.cdiv(dim, cols)](
            tokens, weight, positions, position_weight, token_types, token_type_weight, norm_weight,
            norm_bias, out, statistics, rows, *tables, dim, first, length, eps, *drops, ALIGNED=dim % 64 == 0,
            COLS=cols, num_warps=min(max(cols // (32 * _ELEMENTS), 1), _WARPS), **_EXACT,
        )  # fmt: skip
