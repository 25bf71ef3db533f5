"""Batch norm over rows, a residual addition and an activation on tiles of rows by channels.

A program of a reduction owns one run of consecutive rows and a block of their channels, and keeps its sums in
registers; a second kernel puts the runs together in a fixed order, without atomics. Statistics are sums of
deviations from the mean of a run's first rows, so a large mean cancels nothing. Bytes per element of a
two-byte dtype: statistics 2, forward 4, sums 4, backward 6; a residual adds 2 to the last three and its
gradient 2 to the sums.
"""

import torch
import triton
import triton.language as tl

_COLS = 128  # channels of a tile, at most
_MOVED, _REDUCED = 4096, 2048  # elements of a tile: 32 and, beside the sums, 16 a thread
_WARPS = 4
_MERGE_TILE = {"RUNS": 32, "COLS": 32, "num_warps": 4}  # 128-byte reads of partial
# Fused, the lanes that add a product to each other's would get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        z = tl.where(z < 0.0, 0.0, z)
    if ACTIVATION == 2:
        z = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    if ACTIVATION == 3:
        z = z * (1.0 / (1.0 + tl.exp(-z)))
    if ACTIVATION == 4:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.707106781))
    return z


@triton.jit
def _through(grad, z, ACTIVATION: tl.constexpr):
    """grad times the activation's slope at z."""
    if ACTIVATION == 1:
        grad = tl.where(z <= 0.0, 0.0, grad)
    if ACTIVATION == 2:
        grad = tl.where((z <= 0.0) | (z >= 6.0), 0.0, grad)
    if ACTIVATION == 3:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
    if ACTIVATION == 4:
        density = 0.398942280 * tl.exp(z * z * -0.5)
        grad = grad * (0.5 * (1.0 + tl.erf(z * 0.707106781)) + z * density)
    return grad


@triton.jit
def _scale_shift(weight, bias, variance, eps, col, inside):
    """The factor and the summand of each channel, and its rstd."""
    rstd = tl.rsqrt(_load(variance, col, inside) + eps)
    scale = rstd if weight is None else rstd * _load(weight, col, inside)
    shift = tl.zeros_like(rstd) if bias is None else _load(bias, col, inside)
    return scale, shift, rstd


@triton.jit
def _taken(dy, x, beside, at, inside, mean, scale, shift, READS_X: tl.constexpr, ACTIVATION: tl.constexpr):
    """The gradient before the activation, and x - mean."""
    grad = _load(dy, at, inside)
    deviation = grad
    if READS_X:
        deviation = _load(x, at, inside) - mean[None, :]
    if ACTIVATION != 0:
        if ACTIVATION == 1 and beside is not None:
            z = _load(beside, at, inside)  # y, which is positive where z is
        else:
            z = deviation * scale[None, :] + shift[None, :]
            if beside is not None:
                z += _load(beside, at, inside)
        grad = _through(grad, z, ACTIVATION)
    return grad, deviation


@triton.jit(do_not_specialize=["rows", "rows_per_run"])
def _statistics_kernel(x, partial, rows, channels, rows_per_run, ROWS: tl.constexpr, COLS: tl.constexpr):
    run = tl.program_id(0).to(tl.int64)
    begin = tl.minimum(run * rows_per_run, rows)
    end = tl.minimum(begin + rows_per_run, rows)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    row = begin + tl.arange(0, ROWS)
    inside = (row < end)[:, None] & (col < channels)[None, :]
    first = _load(x, row[:, None] * channels + col[None, :], inside)
    seen = tl.maximum(tl.minimum(end - begin, ROWS), 1)
    shift = tl.sum(first, 0) / seen.to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (col < channels)[None, :]
        value = _load(x, row[:, None] * channels + col[None, :], inside)
        deviation = tl.where(inside, value - shift[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    count = (end - begin).to(tl.float32)
    n = tl.maximum(count, 1.0)
    run_total = tl.sum(total, 0)
    wide = run_total.to(tl.float64)  # whose square overflows later than the sum of squares
    rest = (tl.sum(squares, 0).to(tl.float64) - wide * wide / n.to(tl.float64)).to(tl.float32)
    at = run * 3 * channels + col
    tl.store(partial + at, tl.zeros((COLS,), tl.float32) + count, mask=col < channels)
    tl.store(partial + at + channels, shift + run_total / n, mask=col < channels)
    tl.store(partial + at + 2 * channels, tl.where(rest < 0.0, 0.0, rest), mask=col < channels)


@triton.jit(do_not_specialize=["runs"])
def _merge_kernel(partial, mean, variance, runs, channels, RUNS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    count = tl.zeros((RUNS, COLS), tl.float64)
    total = tl.zeros((RUNS, COLS), tl.float64)
    squares = tl.zeros((RUNS, COLS), tl.float64)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & (col < channels)[None, :]
        at = run.to(tl.int64)[:, None] * 3 * channels + col[None, :]
        n = _load(partial, at, inside).to(tl.float64)
        count += n
        total += n * _load(partial, at + channels, inside).to(tl.float64)
    whole = tl.sum(count, 0)
    whole = tl.where(whole > 0.0, whole, 1.0)
    center = tl.sum(total, 0) / whole
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & (col < channels)[None, :]
        at = run.to(tl.int64)[:, None] * 3 * channels + col[None, :]
        between = _load(partial, at + channels, inside).to(tl.float64) - center[None, :]
        squares += _load(partial, at + 2 * channels, inside).to(tl.float64)
        squares += _load(partial, at, inside).to(tl.float64) * between * between
    tl.store(mean + col, center.to(tl.float32), mask=col < channels)
    tl.store(variance + col, (tl.sum(squares, 0) / whole).to(tl.float32), mask=col < channels)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, bias, mean, variance, y, rows, channels, eps,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = col < channels
    center = _load(mean, col, known)
    scale, shift, _ = _scale_shift(weight, bias, variance, eps, col, known)
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None] * channels + col[None, :]
    z = (_load(x, at, inside) - center[None, :]) * scale[None, :] + shift[None, :]
    if residual is not None:
        z += _load(residual, at, inside)
    tl.store(y + at, _activated(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_run"])
def _sums_kernel(
    dy, x, beside, weight, bias, mean, variance, dresidual, partial, rows, channels, rows_per_run, eps,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    begin = tl.minimum(run * rows_per_run, rows)
    end = tl.minimum(begin + rows_per_run, rows)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = col < channels
    center = _load(mean, col, known)
    scale, shift, _ = _scale_shift(weight, bias, variance, eps, col, known)
    grads = tl.zeros((ROWS, COLS), tl.float32)
    products = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        at = row[:, None] * channels + col[None, :]
        grad, deviation = _taken(dy, x, beside, at, inside, center, scale, shift, True, ACTIVATION)
        if dresidual is not None:
            tl.store(dresidual + at, grad.to(dresidual.dtype.element_ty), mask=inside)
        grads += grad
        products += grad * deviation
    at = run * 2 * channels + col
    tl.store(partial + at, tl.sum(grads, 0), mask=known)
    tl.store(partial + at + channels, tl.sum(products, 0), mask=known)


@triton.jit(do_not_specialize=["runs"])
def _sum_runs_kernel(partial, variance, sums, runs, channels, eps, RUNS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = col < channels
    grads = tl.zeros((RUNS, COLS), tl.float32)
    products = tl.zeros((RUNS, COLS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & known[None, :]
        at = run.to(tl.int64)[:, None] * 2 * channels + col[None, :]
        grads += _load(partial, at, inside)
        products += _load(partial, at + channels, inside)
    rstd = tl.rsqrt(_load(variance, col, known) + eps)
    tl.store(sums + col, tl.sum(grads, 0), mask=known)
    tl.store(sums + channels + col, tl.sum(products, 0) * rstd, mask=known)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, x, beside, weight, bias, mean, variance, sums, dx, rows, channels, eps,
    READS_X: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = col < channels
    center = _load(mean, col, known)
    scale, shift, rstd = _scale_shift(weight, bias, variance, eps, col, known)
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None] * channels + col[None, :]
    grad, deviation = _taken(dy, x, beside, at, inside, center, scale, shift, READS_X, ACTIVATION)
    if sums is not None:
        grad -= (_load(sums, col, known) / rows)[None, :]
        grad -= deviation * (_load(sums, channels + col, known) / rows * rstd)[None, :]
    tl.store(dx + at, (grad * scale[None, :]).to(dx.dtype.element_ty), mask=inside)


def _tile(channels, elements):
    cols = min(triton.next_power_of_2(channels), _COLS)
    return {"ROWS": elements // cols, "COLS": cols, "num_warps": _WARPS}


def _extent(x):
    channels = x.shape[-1]
    return x.numel() // channels, channels


def _rows_per_run(rows, runs):
    """As BatchNormActShape has it."""
    return triton.cdiv(triton.cdiv(rows, runs), 32) * 32


def statistics(x, partial, mean, variance):
    """Mean and variance of each channel over the rows of x; the contract is that of csrc/batch_norm_act.h.

    Args:
        x: (..., channels), contiguous; None where partial is filled already.
        partial: (partials, 3, channels) float32: count, mean and squared deviations of each run of rows.
        mean, variance: (channels,) float32.
    """
    runs, _, channels = partial.shape
    with torch.cuda.device_of(partial):
        if x is not None:
            rows, _ = _extent(x)
            tile = _tile(channels, _REDUCED)
            grid = (runs, triton.cdiv(channels, tile["COLS"]))
            _statistics_kernel[grid](x, partial, rows, channels, _rows_per_run(rows, runs), **_EXACT, **tile)
        grid = (triton.cdiv(channels, _MERGE_TILE["COLS"]),)
        _merge_kernel[grid](partial, mean, variance, runs, channels, **_EXACT, **_MERGE_TILE)


def forward(x, residual, weight, bias, mean, variance, y, eps, activation, running):
    """y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual).

    Args:
        x, residual, y: (..., channels), contiguous; residual: or None.
        weight, bias, mean, variance: (channels,) float32; weight and bias: or None.
        activation: its number in csrc/batch_norm_act.h.
        running: of no meaning here: statistics on a GPU are not checked.
    """
    rows, channels = _extent(x)
    tile = _tile(channels, _MOVED)
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLS"]))
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, residual, weight, bias, mean, variance, y, rows, channels, eps, ACTIVATION=activation,
            **_EXACT, **tile,
        )  # fmt: skip


def sums(dy, x, beside, weight, bias, mean, variance, dresidual, partial, sums, eps, activation):
    """The sums over rows that are dbias and dweight, and the gradient before the activation if it is wanted.

    Args:
        dy, x, beside, dresidual: (..., channels), contiguous. beside: y where the activation is relu, else
            residual; None where there was none. dresidual: or None.
        partial: (partials, 2, channels) float32, scratch.
        sums: (2, channels) float32.
    """
    rows, channels = _extent(dy)
    runs = partial.shape[0]
    tile = _tile(channels, _REDUCED)
    with torch.cuda.device_of(dy):
        _sums_kernel[(runs, triton.cdiv(channels, tile["COLS"]))](
            dy, x, beside, weight, bias, mean, variance, dresidual, partial, rows, channels,
            _rows_per_run(rows, runs), eps, ACTIVATION=activation, **_EXACT, **tile,
        )  # fmt: skip
        grid = (triton.cdiv(channels, _MERGE_TILE["COLS"]),)
        _sum_runs_kernel[grid](partial, variance, sums, runs, channels, eps, **_EXACT, **_MERGE_TILE)


def backward(dy, x, beside, weight, bias, mean, variance, sums, dx, eps, activation):
    """The gradient of x; sums: those of `sums`, or None where mean and variance are constants."""
    rows, channels = _extent(dy)
    tile = {**_tile(channels, _REDUCED), "maxnreg": 136}  # left to itself, ptxas spills for sm_100
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLS"]))
    by_output = activation == 1 and beside is not None
    reads_x = sums is not None or (activation != 0 and not by_output)
    with torch.cuda.device_of(dy):
        _backward_kernel[grid](
            dy, x, beside, weight, bias, mean, variance, sums, dx, rows, channels, eps,
            READS_X=reads_x, ACTIVATION=activation, **_EXACT, **tile,
        )  # fmt: skip
