"""Layer norm and RMS norm on tiles of whole rows, one read and one write per element.

A program keeps a tile of rows (one row, or several narrow ones) in registers, so the two passes of the
statistics cost no memory traffic; a row too wide for that is walked in blocks, again from the L2 cache. The
backward gives each program one run of consecutive rows and keeps the run's dweight and dbias in registers; a
second kernel adds the runs in a fixed order, without atomics. Bytes per element of a two-byte dtype: forward
4, with a residual 8; backward 6, with dsum 8.
"""

import torch
import triton
import triton.language as tl

# maxnreg: left to itself, ptxas aims at one more block per multiprocessor and spills for it.
_WIDE_BLOCK = {"COLS": 4096, "num_warps": 8, "maxnreg": 128}
_PARTIAL_BLOCK = {"COLS": 1024, "num_warps": 4}
_SUM_TILE = {"RUNS": 16, "COLS": 32, "num_warps": 4}  # 128-byte reads of partial, 8 a thread in flight
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit, and all
# of them store theirs to one shared address: the result would depend on which lane comes last.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _mean_rstd(statistics, rows, CENTERED: tl.constexpr):
    """Where the means and the rstds begin; in RMS norm there are no means."""
    return statistics, statistics + rows if CENTERED else statistics


@triton.jit
def _inside(row_inside, col_inside):
    """The mask of a tile; a tile of one row has no row outside."""
    if row_inside.shape[0] == 1:
        return col_inside[None, :]
    return row_inside[:, None] & col_inside[None, :]


@triton.jit
def _load_sum(x, residual, sum, start, at, inside):
    """Reads x, or x + residual as rounded to sum's dtype, which is stored."""
    value = _load(x + start, at, inside)
    if residual is not None:
        rounded = (value + _load(residual + start, at, inside)).to(sum.dtype.element_ty)
        tl.store(sum + start + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, bias, sum, y, statistics, rows, cols, eps,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    mean, rstd = _mean_rstd(statistics, rows, CENTERED)
    first = tl.program_id(0).to(tl.int64) * ROWS
    start = first * cols
    row = first + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = tl.arange(0, ROWS)[:, None] * cols + col[None, :]  # (ROWS, COLS), within the tile: 32 bits
    inside = _inside(row < rows, col < cols)
    value = _load_sum(x, residual, sum, start, at, inside)
    if CENTERED:
        row_mean = tl.sum(value, 1) / cols
        tl.store(mean + row, row_mean, mask=row < rows)
        value = tl.where(inside, value - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(value * value, 1) / cols + eps)
    tl.store(rstd + row, row_rstd, mask=row < rows)
    out = value * row_rstd[:, None]
    if weight is not None:
        out *= _load(weight, col, col < cols)[None, :]
    if bias is not None:
        out += _load(bias, col, col < cols)[None, :]
    tl.store(y + start + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _wide_forward_kernel(
    x, residual, weight, bias, sum, y, statistics, rows, cols, eps,
    CENTERED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    mean, rstd = _mean_rstd(statistics, rows, CENTERED)
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, COLS)
    row_mean = 0.0
    if residual is not None or CENTERED:
        total = tl.zeros((COLS,), tl.float32)
        for start in range(0, cols, COLS):
            col = start + block
            total += _load_sum(x, residual, sum, row * cols, col, col < cols)
        if CENTERED:
            row_mean = tl.sum(total, 0) / cols
            tl.store(mean + row, row_mean)
    if residual is not None:
        x = sum
        tl.debug_barrier()  # sum is read back, maybe by other threads than stored it

    squares = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        col = start + block
        value = tl.where(col < cols, _load(x + row * cols, col, col < cols) - row_mean, 0.0)
        squares += value * value
    row_rstd = tl.rsqrt(tl.sum(squares, 0) / cols + eps)
    tl.store(rstd + row, row_rstd)

    for start in range(0, cols, COLS):
        col = start + block
        out = (_load(x + row * cols, col, col < cols) - row_mean) * row_rstd
        if weight is not None:
            out *= _load(weight, col, col < cols)
        if bias is not None:
            out += _load(bias, col, col < cols)
        tl.store(y + row * cols + col, out.to(y.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["rows", "rows_per_run"])
def _backward_kernel(
    dy, dsum, sum, statistics, weight, dx, partial, rows, cols, rows_per_run,
    CENTERED: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    mean, rstd = _mean_rstd(statistics, rows, CENTERED)
    run = tl.program_id(0).to(tl.int64)
    begin = run * rows_per_run
    end = tl.minimum(begin + rows_per_run, rows)
    col = tl.arange(0, COLS)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * cols + col[None, :]  # (ROWS, COLS)
        inside = _inside(row < end, col < cols)
        row_rstd = _load(rstd, row, row < end)[:, None]
        normal = _load(sum, at, inside)
        if CENTERED:
            normal -= _load(mean, row, row < end)[:, None]
        normal *= row_rstd
        grad = _load(dy, at, inside)
        if DWEIGHT:
            dweight = tl.fma(grad, normal, dweight)
        if DBIAS:
            dbias += grad
        if weight is not None:
            grad *= _load(weight, col, col < cols)[None, :]
        mean_product = (tl.sum(grad * normal, 1) / cols)[:, None]
        if CENTERED:
            grad -= (tl.sum(grad, 1) / cols)[:, None]
        grad = tl.fma(-normal, mean_product, grad) * row_rstd
        if dsum is not None:
            grad += _load(dsum, at, inside)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
    at = run * 2 * cols + col
    if DWEIGHT:
        tl.store(partial + at, tl.sum(dweight, 0), mask=col < cols)
    if DBIAS:
        tl.store(partial + at + cols, tl.sum(dbias, 0), mask=col < cols)


@triton.jit(do_not_specialize=["rows"])
def _wide_dx_kernel(
    dy, dsum, sum, statistics, weight, dx, rows, cols,
    CENTERED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    mean, rstd = _mean_rstd(statistics, rows, CENTERED)
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, COLS)
    row_mean = tl.load(mean + row) if CENTERED else 0.0
    row_rstd = tl.load(rstd + row)
    total = tl.zeros((COLS,), tl.float32)
    product = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        col = start + block
        at = row * cols + col
        grad = _load(dy, at, col < cols)
        if weight is not None:
            grad *= _load(weight, col, col < cols)
        product += grad * (_load(sum, at, col < cols) - row_mean) * row_rstd
        if CENTERED:
            total += grad
    mean_total = tl.sum(total, 0) / cols
    mean_product = tl.sum(product, 0) / cols

    for start in range(0, cols, COLS):
        col = start + block
        at = row * cols + col
        grad = _load(dy, at, col < cols)
        if weight is not None:
            grad *= _load(weight, col, col < cols)
        normal = (_load(sum, at, col < cols) - row_mean) * row_rstd
        grad = (grad - normal * mean_product - mean_total) * row_rstd
        if dsum is not None:
            grad += _load(dsum, at, col < cols)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["rows", "rows_per_run"])
def _wide_partial_kernel(
    dy, sum, statistics, partial, rows, cols, rows_per_run,
    CENTERED: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    mean, rstd = _mean_rstd(statistics, rows, CENTERED)
    blocks = tl.cdiv(cols, COLS)
    run = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    dweight = tl.zeros((COLS,), tl.float32)
    dbias = tl.zeros((COLS,), tl.float32)
    for row in range(run * rows_per_run, tl.minimum((run + 1) * rows_per_run, rows)):
        grad = _load(dy, row * cols + col, col < cols)
        if DWEIGHT:
            row_mean = tl.load(mean + row) if CENTERED else 0.0
            normal = (_load(sum, row * cols + col, col < cols) - row_mean) * tl.load(rstd + row)
            dweight = tl.fma(grad, normal, dweight)
        if DBIAS:
            dbias += grad
    at = run * 2 * cols + col
    if DWEIGHT:
        tl.store(partial + at, dweight, mask=col < cols)
    if DBIAS:
        tl.store(partial + at + cols, dbias, mask=col < cols)


@triton.jit
def _sum_runs(partial, out, runs, cols, RUNS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((RUNS, COLS), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        at = run.to(tl.int64)[:, None] * 2 * cols + col[None, :]
        total += _load(partial, at, (run < runs)[:, None] & (col < cols)[None, :])
    tl.store(out + col, tl.sum(total, 0).to(out.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["runs"])
def _sum_partials_kernel(partial, dweight, dbias, runs, cols, RUNS: tl.constexpr, COLS: tl.constexpr):
    if dweight is not None:
        _sum_runs(partial, dweight, runs, cols, RUNS, COLS)
    if dbias is not None:
        _sum_runs(partial + cols, dbias, runs, cols, RUNS, COLS)


def _tile(cols, tensors):
    """The tile that holds rows of `cols` elements, with its warps; None where a row is too wide for one.

    Triton reads 16 bytes at a time where it sees that it may, else element by element, with an address for
    each: a thread then has registers for fewer elements.
    """
    aligned = cols % 16 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    per_thread, most_warps = (16, 16) if aligned else (8, 8)
    width = triton.next_power_of_2(cols)
    rows = max(1, 4 * 32 * per_thread // width)
    warps = rows * width // (32 * per_thread)
    if warps > most_warps:
        return None
    registers = 128 if aligned and rows == 1 else 255
    return {"ROWS": rows, "COLS": width, "num_warps": warps, "maxnreg": registers}


def forward(x, residual, weight, bias, sum, y, statistics, eps, centered):
    """Normalises the rows of x, or of x + residual; the contract is that of csrc/layer_norm.h.

    Args:
        x, residual, sum, y: (..., cols), contiguous; residual and sum None without a residual.
        weight, bias: (cols,) of x's dtype or float32, or None.
        statistics: (2, rows) float32, mean and rstd; (1, rows), rstd, in RMS norm.
        eps: added to the variance.
        centered: whether the mean is subtracted (layer norm) or not (RMS norm).
    """
    if x.numel() == 0:
        return
    cols = x.shape[-1]
    rows = x.numel() // cols
    tensors = (x, residual, weight, bias, sum, y)
    tile = _tile(cols, tensors)
    arguments = (*tensors, statistics, rows, cols, eps)
    flags = {"CENTERED": centered, **_EXACT}
    with torch.cuda.device_of(x):
        if tile is None:
            _wide_forward_kernel[(rows,)](*arguments, **flags, **_WIDE_BLOCK)
        else:
            grid = (triton.cdiv(rows, tile["ROWS"]),)
            _forward_kernel[grid](*arguments, **flags, **tile)


def backward(dy, dsum, sum, statistics, weight, dx, dweight, dbias, partial, centered):
    """The gradients of `forward`, from what it saved; the contract is that of csrc/layer_norm.h.

    Args:
        dy, dsum, sum, dx: (..., cols), contiguous; dsum None where sum has no gradient of its own.
        statistics: as saved by the forward.
        weight: (cols,), or None.
        dweight, dbias: (cols,) of weight's dtype, or None where not wanted.
        partial: (partials, 2, cols) float32, scratch; unused where neither dweight nor dbias is wanted.
        centered: as in the forward.
    """
    wanted = [grad for grad in (dweight, dbias) if grad is not None]
    if dy.numel() == 0:
        for grad in wanted:
            grad.zero_()
        return
    cols = dy.shape[-1]
    rows = dy.numel() // cols
    flags = {"CENTERED": centered, **_EXACT}
    grads = {"DWEIGHT": dweight is not None, "DBIAS": dbias is not None}
    tile = _tile(cols, (dy, dsum, sum, weight, dx))
    with torch.cuda.device_of(dy):
        if tile is None:
            _wide_dx_kernel[(rows,)](
                dy, dsum, sum, statistics, weight, dx, rows, cols, **flags, **_WIDE_BLOCK
            )
            if wanted:
                runs = partial.shape[0]
                grid = (runs * triton.cdiv(cols, _PARTIAL_BLOCK["COLS"]),)
                extent = (rows, cols, triton.cdiv(rows, runs))
                _wide_partial_kernel[grid](
                    dy, sum, statistics, partial, *extent, **flags, **grads, **_PARTIAL_BLOCK
                )
        else:
            runs = partial.shape[0] if wanted else triton.cdiv(rows, tile["ROWS"])
            extent = (rows, cols, triton.cdiv(rows, runs))
            tensors = (dy, dsum, sum, statistics, weight, dx, partial if wanted else None)
            _backward_kernel[(runs,)](*tensors, *extent, **flags, **grads, **tile)
        if wanted:
            grid = (triton.cdiv(cols, _SUM_TILE["COLS"]),)
            _sum_partials_kernel[grid](partial, dweight, dbias, runs, cols, **_EXACT, **_SUM_TILE)
