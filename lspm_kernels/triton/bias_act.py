"""A bias and an activation on tiles of rows by columns, one read and one write per element.

In the backward a program owns one run of consecutive rows and a block of their columns, and keeps dbias of
these in registers; a second kernel adds the runs in a fixed order, without atomics. Bytes per element of a
two-byte dtype: forward 4; backward 6, with y 8.
"""

import torch
import triton
import triton.language as tl

_COLS = 128  # columns of a tile, at most: 256 bytes of a two-byte dtype are read in one go
_MOVED, _REDUCED = 4096, 2048  # elements of a tile: 32 and, beside the sums, 16 a thread
_WARPS = 4
_SUM_TILE = {"RUNS": 32, "COLS": 32, "num_warps": 4}  # 128-byte reads of partial
# Fused, the lanes that add a product to each other's would get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def cdf(z, ACTIVATION: tl.constexpr):
    """The activation is z * cdf(z), by its number in csrc/activation.h."""
    if ACTIVATION == 1:  # relu
        return tl.where(z > 0.0, 1.0, 0.0)
    if ACTIVATION == 3:  # silu
        return 1.0 / (1.0 + tl.exp(-z))
    if ACTIVATION == 4:  # gelu
        return 0.5 * (1.0 + tl.erf(z * 0.707106781))
    return 1.0 / (1.0 + tl.exp(-z * (1.59576912 + 0.0713548163 * z * z)))  # gelu_tanh


@triton.jit
def activated(z, c, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.where(z < 0.0, 0.0, z)  # NaN where z is
    return z * c


@triton.jit
def slope(z, c, ACTIVATION: tl.constexpr):
    """cdf(z) + z * density(z)."""
    if ACTIVATION == 1:
        return tl.where(z <= 0.0, 0.0, 1.0)
    if ACTIVATION == 3:
        return c + z * c * (1.0 - c)
    if ACTIVATION == 4:
        return c + z * (0.398942280 * tl.exp(z * z * -0.5))
    return c + z * c * (1.0 - c) * (1.59576912 + 0.214064449 * z * z)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(x, bias, y, rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    z = load(x, at, inside)
    if bias is not None:
        z += load(bias, col, col < cols)[None, :]
    value = activated(z, cdf(z, ACTIVATION), ACTIVATION)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_run"])
def _backward_kernel(
    dy, x, bias, dx, y, partial, rows, cols, rows_per_run,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    begin = tl.minimum(run * rows_per_run, rows)
    end = tl.minimum(begin + rows_per_run, rows)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = col < cols
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        at = row[:, None] * cols + col[None, :]
        z = load(x, at, inside)
        if bias is not None:
            z += load(bias, col, known)[None, :]
        c = cdf(z, ACTIVATION)
        grad = load(dy, at, inside) * slope(z, c, ACTIVATION)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
        if y is not None:
            tl.store(y + at, activated(z, c, ACTIVATION).to(y.dtype.element_ty), mask=inside)
        if partial is not None:
            total += tl.where(inside, grad, 0.0)
    if partial is not None:
        tl.store(partial + run * cols + col, tl.sum(total, 0), mask=known)


@triton.jit(do_not_specialize=["runs"])
def _sum_runs_kernel(partial, dbias, runs, cols, RUNS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((RUNS, COLS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        at = run.to(tl.int64)[:, None] * cols + col[None, :]
        total += load(partial, at, (run < runs)[:, None] & (col < cols)[None, :])
    tl.store(dbias + col, tl.sum(total, 0).to(dbias.dtype.element_ty), mask=col < cols)


def tile(cols, elements):
    """A tile of so many elements, with its warps.

    Triton reads 16 bytes at a time where it sees that it may, else element by element, with an address for
    each: a thread then has registers for fewer elements.
    """
    if cols % 16:
        elements //= 4
    width = min(triton.next_power_of_2(cols), _COLS)
    # maxnreg: left to itself, ptxas aims at one more block per multiprocessor and spills for it.
    return {"ROWS": elements // width, "COLS": width, "num_warps": _WARPS, "maxnreg": 128}


def forward(x, bias, y, activation):
    """y = activation(x + bias); the contract is that of csrc/bias_act.h.

    Args:
        x, y: (..., cols), contiguous.
        bias: (cols,) of x's dtype or float32, or None.
        activation: its number in csrc/activation.h.
    """
    cols = x.shape[-1]
    rows, moved = x.numel() // cols, tile(cols, _MOVED)
    grid = (triton.cdiv(rows, moved["ROWS"]), triton.cdiv(cols, moved["COLS"]))
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, bias, y, rows, cols, ACTIVATION=activation, **_EXACT, **moved)


def backward(dy, x, bias, dx, dbias, y, partial, activation):
    """The gradients of `forward`, and its output again.

    Args:
        dy, x, dx, y: (..., cols), contiguous; y None where it is not wanted.
        bias: as in the forward.
        dbias: (cols,) of bias's dtype, or None.
        partial: (partials, cols) float32, scratch; None where dbias is.
    """
    cols = x.shape[-1]
    rows, reduced = x.numel() // cols, tile(cols, _REDUCED)
    runs = triton.cdiv(rows, reduced["ROWS"]) if partial is None else partial.shape[0]
    grid = (runs, triton.cdiv(cols, reduced["COLS"]))
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            dy, x, bias, dx, y, partial, rows, cols, triton.cdiv(rows, runs), ACTIVATION=activation,
            **_EXACT, **reduced,
        )  # fmt: skip
        if dbias is not None:
            sums = (triton.cdiv(cols, _SUM_TILE["COLS"]),)
            _sum_runs_kernel[sums](partial, dbias, runs, cols, **_EXACT, **_SUM_TILE)
