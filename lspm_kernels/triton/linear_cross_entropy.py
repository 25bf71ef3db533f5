"""What stands between the products of linear_cross_entropy: passes over a block of logits that one just made.

The forward's program owns one row of the block, or several narrow ones, and walks its logits tile by tile,
each read once, with an online softmax (Milakov and Gimelshein 2018) that goes on from what the blocks before
left. The backward owns tiles, each read once and written once, in place.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from lspm_kernels.triton.cross_entropy import classes_of, spread

_TILE = 4096  # logits, at most: with 8 warps 16 a thread
_NARROW = 1024  # of several rows: 8 a thread, as a row brings numbers of its own
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _shift_of(largest):
    """What exps are relative to. Where all are -inf so far, exp() is 0 of the logits as they are."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _kept_of(kept, row, rows, exists, BEGINS: tl.constexpr):
    """What the blocks before left of rows: the largest logit and sums, those of exp() relative to it."""
    nothing = tl.zeros(row.shape, tl.float32)
    if BEGINS:
        return nothing + float("-inf"), nothing, nothing, nothing, nothing
    return (
        tl.load(kept + row, mask=exists, other=0.0),
        tl.load(kept + rows + row, mask=exists, other=0.0),
        tl.load(kept + 2 * rows + row, mask=exists, other=0.0),
        tl.load(kept + 3 * rows + row, mask=exists, other=0.0),
        tl.load(kept + 4 * rows + row, mask=exists, other=0.0),
    )


@triton.jit(do_not_specialize=["rows", "first"])
def _forward_kernel(
    logits, target, weight, kept, losses, rows, cols, first, classes, ignore_index, smoothing, z_loss,
    softcap, BEGINS: tl.constexpr, ENDS: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr,
    Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    wanted, share, known, ignored = classes_of(target, weight, row, exists, classes, ignore_index)
    largest, exps, q, products, at_target = _kept_of(kept, row, rows, exists, BEGINS)
    for start in range(0, cols, COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        at = row[:, None] * cols + col
        inside = known[:, None] & (col < cols)
        value = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            value = libdevice.tanh(value / softcap) * softcap
        seen = tl.maximum(largest, tl.max(tl.where(inside, value, float("-inf")), 1))
        shift = _shift_of(seen)
        relative = tl.where(inside, value - shift[:, None], float("-inf"))
        exps = exps * tl.exp(largest - shift) + tl.sum(tl.exp(relative), 1)
        if SMOOTH:
            part = spread(target, weight, at, first + col, inside, smoothing, classes, False)
            product = part * tl.where(inside, relative, 0.0)
            products += q * (_shift_of(largest) - shift) + tl.sum(product, 1)
            q += tl.sum(part, 1)
        here = inside & (first + col == wanted[:, None])
        at_target += tl.sum(tl.where(here, value, 0.0), 1)
        largest = seen
    if ENDS:
        log = tl.log(exps)
        lse = largest + log
        hit = (1.0 - smoothing) * share
        loss = (log - (at_target - largest)) * hit
        if SMOOTH:
            loss += log * q - products
        if Z:
            loss += z_loss * share * lse * lse
        unknown = tl.where(ignored, 0.0, float("nan"))
        tl.store(losses + row, tl.where(known, loss, unknown), mask=exists)
        largest = tl.where(known, largest, 0.0)
        exps = tl.where(known, log, unknown)
        q += hit
    tl.store(kept + row, largest, mask=exists)
    tl.store(kept + rows + row, exps, mask=exists)
    tl.store(kept + 2 * rows + row, q, mask=exists)
    if not ENDS:
        tl.store(kept + 3 * rows + row, products, mask=exists)
        tl.store(kept + 4 * rows + row, at_target, mask=exists)


@triton.jit(do_not_specialize=["rows", "first"])
def _backward_kernel(
    dloss, dlse, logits, target, weight, statistics, rows, cols, first, classes, ignore_index, smoothing,
    z_loss, softcap,
    SMOOTH: tl.constexpr, CAPPED: tl.constexpr, Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    wanted, share, known, ignored = classes_of(target, weight, row, exists, classes, ignore_index)
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    at = row[:, None] * cols + col
    inside = exists[:, None] & (col < cols)
    product = tl.load(logits + at, mask=inside & known[:, None], other=0.0).to(tl.float32)
    largest = tl.load(statistics + row, mask=exists, other=0.0)
    log = tl.load(statistics + rows + row, mask=exists, other=0.0)
    q = tl.load(statistics + 2 * rows + row, mask=exists, other=0.0)
    scale = tl.load(dloss + row, mask=exists, other=0.0)
    if Z:
        q += 2.0 * z_loss * share * (largest + log)
    all = scale * q
    if dlse is not None:
        all += tl.load(dlse + row, mask=exists, other=0.0)
    value = product
    if CAPPED:
        value = libdevice.tanh(product / softcap) * softcap
    gradient = tl.exp((value - largest[:, None]) - log[:, None]) * all[:, None]
    if SMOOTH:
        part = spread(target, weight, at, first + col, inside, smoothing, classes, False)
        gradient -= part * scale[:, None]
    hit = scale * ((1.0 - smoothing) * share)
    gradient -= tl.where(first + col == wanted[:, None], hit[:, None], 0.0)
    if CAPPED:  # the derivative of tanh: 1 - tanh^2 would lose what is small of it
        far = tl.exp(-2.0 * tl.abs(product / softcap))
        gradient *= far * 4.0 / ((far + 1.0) * (far + 1.0))
    unknown = tl.where(ignored, 0.0, float("nan"))
    gradient = tl.where(known[:, None], gradient, unknown[:, None])
    tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=inside)


def forward(logits, target, weight, kept, losses, first, classes, ignore_index, smoothing, z_loss, softcap):
    """Adds a block to what is kept of rows; the contract is that of csrc/linear_cross_entropy.h."""
    if logits.numel() == 0:
        return
    options = first, classes, ignore_index, smoothing, z_loss, softcap
    ends = {"BEGINS": first == 0, "ENDS": first + logits.shape[1] == classes}
    tile, flags = _options(logits, smoothing, z_loss, softcap)
    grid = (triton.cdiv(len(logits), tile["ROWS"]),)
    with torch.cuda.device_of(logits):
        _forward_kernel[grid](
            logits, target, weight, kept, losses, *logits.shape, *options, **ends, **flags, **tile
        )


def backward(
    dloss,
    dlse,
    logits,
    target,
    weight,
    statistics,
    dbias,
    first,
    classes,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
):
    """Turns a block into its gradient, in place."""
    if logits.numel() == 0:
        return
    options = first, classes, ignore_index, smoothing, z_loss, softcap
    tile, flags = _options(logits, smoothing, z_loss, softcap)
    grid = (triton.cdiv(len(logits), tile["ROWS"]), triton.cdiv(logits.shape[1], tile["COLS"]))
    given = dloss, dlse, logits, target, weight, statistics
    with torch.cuda.device_of(logits):
        _backward_kernel[grid](*given, *logits.shape, *options, **flags, **tile)
    if dbias is not None:
        dbias += logits.sum(0, dtype=torch.float32)


def _options(logits, smoothing, z_loss, softcap):
    """The tile of a launch and its constants."""
    cols = min(triton.next_power_of_2(logits.shape[1]), _TILE)
    tile = {"ROWS": max(1, _NARROW // cols), "COLS": cols, "num_warps": 8 if cols == _TILE else 4}
    if tile["ROWS"] > 1:
        tile["maxnreg"] = 168  # left to itself, ptxas aims at one more block and spills
    return tile, {"SMOOTH": smoothing > 0, "CAPPED": softcap > 0, "Z": z_loss > 0, **_EXACT}
