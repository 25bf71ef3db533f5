"""Cross entropy on tiles of rows, with an online softmax (Milakov and Gimelshein 2018).

A program owns one row, or several narrow ones, and walks its logits tile by tile, each read once; sums are
relative to the largest logit so far. A second program of one block adds the losses of rows in a fixed order.
The backward owns tiles, each read once and written once.
"""

import torch
import triton
import triton.language as tl

_TILE = 4096  # logits, at most: with 8 warps 16 a thread
_NARROW = 1024  # of several rows: 8 a thread, as a row brings numbers of its own
_SUMMED = 1024  # rows at a time
_NONE, _MEAN = 0, 1
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def spread(target, weight, at, col, inside, smoothing, classes, PROBABILITIES: tl.constexpr):
    """The q of a tile, but for what the target's class alone has of it."""
    q = tl.where(inside, smoothing / classes, 0.0)
    if PROBABILITIES:
        q += (1.0 - smoothing) * tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        q *= tl.load(weight + col, mask=col < classes, other=0.0)
    return q


@triton.jit
def classes_of(target, weight, row, exists, classes, ignore_index):
    """Of the rows' targets: the class, its weight, and whether it is one of `classes` and to be ignored."""
    wanted = tl.load(target + row, mask=exists, other=0)
    ignored = exists & (wanted == ignore_index)
    known = exists & (wanted >= 0) & (wanted < classes) & (wanted != ignore_index)
    share = tl.where(known, 1.0, 0.0)
    if weight is not None:
        share = tl.load(weight + wanted, mask=known, other=0.0)
    return wanted, share, known, ignored


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    logits, target, weight, loss, statistics, row_losses, rows, classes, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    read = exists
    if not PROBABILITIES:
        wanted, share, known, ignored = classes_of(target, weight, row, exists, classes, ignore_index)
        read = known
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    exps = tl.zeros((ROWS,), tl.float32)
    products = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    for start in range(0, classes, COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        at = row[:, None] * classes + col
        inside = read[:, None] & (col < classes)
        value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        seen = tl.maximum(largest, tl.max(value, 1))
        # Where all are -inf so far, exp() is 0 of the logits as they are.
        next_shift = tl.where(seen == float("-inf"), 0.0, seen)
        exps = exps * tl.exp(largest - next_shift) + tl.sum(tl.exp(value - next_shift[:, None]), 1)
        if SPREAD:
            part = spread(target, weight, at, col, inside, smoothing, classes, PROBABILITIES)
            product = part * tl.where(inside, value - next_shift[:, None], 0.0)
            products += q * (shift - next_shift) + tl.sum(product, 1)
            q += tl.sum(part, 1)
        largest, shift = seen, next_shift
    log = tl.log(exps)
    total = log * q - products if SPREAD else tl.zeros((ROWS,), tl.float32)
    of_row = tl.full((ROWS,), 1.0, tl.float32)
    if not PROBABILITIES:
        hit = (1.0 - smoothing) * share
        at_target = tl.load(logits + row * classes + wanted, mask=known, other=0.0).to(tl.float32)
        unknown = tl.where(ignored, 0.0, float("nan"))
        total = tl.where(known, total + (log - (at_target - largest)) * hit, unknown)
        of_row = tl.where(known, share, unknown)
        q = tl.where(known, q + hit, unknown)
    tl.store(statistics + row, largest, mask=exists)
    tl.store(statistics + rows + row, log, mask=exists)
    tl.store(statistics + 2 * rows + row, q, mask=exists)
    if REDUCTION == 0:
        tl.store(loss + row, total.to(loss.dtype.element_ty), mask=exists)
    else:
        tl.store(row_losses + row, total, mask=exists)
        tl.store(row_losses + rows + row, of_row, mask=exists)
    if REDUCTION != 1:
        tl.store(statistics + 3 * rows, 1.0, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(row_losses, loss, statistics, rows, MEAN: tl.constexpr, ROWS: tl.constexpr):
    losses = tl.zeros((ROWS,), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        losses += tl.load(row_losses + row, mask=row < rows, other=0.0)
        weights += tl.load(row_losses + rows + row, mask=row < rows, other=0.0)
    total = tl.sum(losses, 0)
    if MEAN:
        divisor = tl.sum(weights, 0)
        tl.store(statistics + 3 * rows, divisor)
        total = total / divisor
    tl.store(loss, total.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dloss, logits, target, weight, statistics, dlogits, rows, classes, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    at = row[:, None] * classes + col
    inside = exists[:, None] & (col < classes)
    read = inside
    if not PROBABILITIES:
        wanted, share, known, ignored = classes_of(target, weight, row, exists, classes, ignore_index)
        read = inside & known[:, None]
    value = tl.load(logits + at, mask=read, other=0.0).to(tl.float32)
    largest = tl.load(statistics + row, mask=exists, other=0.0)[:, None]
    log = tl.load(statistics + rows + row, mask=exists, other=0.0)[:, None]
    total = tl.load(statistics + 2 * rows + row, mask=exists, other=0.0)
    own = row if REDUCTION == 0 else row * 0
    scale = tl.load(dloss + own, mask=exists, other=0.0).to(tl.float32)
    scale = scale / tl.load(statistics + 3 * rows)
    gradient = tl.exp((value - largest) - log) * (scale * total)[:, None]
    if SPREAD:
        part = spread(target, weight, at, col, inside, smoothing, classes, PROBABILITIES)
        gradient -= part * scale[:, None]
    if not PROBABILITIES:
        hit = scale * ((1.0 - smoothing) * share)
        gradient -= tl.where(col == wanted[:, None], hit[:, None], 0.0)
        unknown = tl.where(ignored, 0.0, float("nan"))
        gradient = tl.where(known[:, None], gradient, unknown[:, None])
    tl.store(dlogits + at, gradient.to(dlogits.dtype.element_ty), mask=inside)


def forward(logits, target, weight, loss, statistics, row_losses, ignore_index, reduction, smoothing):
    """Losses and what the backward needs; the contract is that of csrc/cross_entropy.h.

    Args:
        logits: (rows, classes), contiguous.
        target: (rows,) int64, or (rows, classes) of logits' dtype.
        weight: (classes,) float32, or None.
        loss: (rows,) or (), of logits' dtype.
        statistics: (3 * rows + 1,) float32.
        row_losses: (2, rows) float32, scratch.
        ignore_index, reduction, smoothing: as in the contract.
    """
    rows = logits.shape[0]
    given = (logits, target, weight, loss, statistics, row_losses)
    with torch.cuda.device_of(logits):
        if rows:
            tile, options = _options(logits, target, ignore_index, reduction, smoothing)
            _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](*given, *options[0], **options[1], **tile)
        if reduction != _NONE:
            mean = reduction == _MEAN
            _sum_kernel[(1,)](row_losses, loss, statistics, rows, MEAN=mean, ROWS=_SUMMED, **_EXACT)


def backward(dloss, logits, target, weight, statistics, dlogits, ignore_index, reduction, smoothing):
    """The gradient of logits, from what `forward` kept."""
    if logits.numel() == 0:
        return
    tile, options = _options(logits, target, ignore_index, reduction, smoothing)
    grid = (triton.cdiv(logits.shape[0], tile["ROWS"]), triton.cdiv(logits.shape[1], tile["COLS"]))
    given = (dloss, logits, target, weight, statistics, dlogits)
    with torch.cuda.device_of(logits):
        _backward_kernel[grid](*given, *options[0], **options[1], **tile)


def _options(logits, target, ignore_index, reduction, smoothing):
    """The tile of a launch, its numbers and its constants."""
    rows, classes = logits.shape
    cols = min(triton.next_power_of_2(max(classes, 1)), _TILE)
    tile = {"ROWS": max(1, _NARROW // cols), "COLS": cols, "num_warps": 8 if cols == _TILE else 4}
    if tile["ROWS"] > 1:
        tile["maxnreg"] = 128  # left to itself, ptxas aims at one more block and spills
    probabilities = target.is_floating_point()
    flags = {"PROBABILITIES": probabilities, "SPREAD": probabilities or smoothing > 0}
    return tile, ((rows, classes, ignore_index, smoothing), {**flags, "REDUCTION": reduction, **_EXACT})
