"""Convolution as implicit GEMM with its epilogue, and both gradients, over images (N, H, W, C).

A program owns a tile of pixels x filters of one group, whose sums stay in registers while the products of all
taps and channels pass through shared memory; the epilogue is applied before the one store. Few channels are
walked side by side with the taps, so that a tile of them is full; groups too narrow for a tensor core are
multiplied element by element. The gradient of x is the same sum over dz: pixels of x whose place is alike
modulo the stride share the taps that reach them, and a program owns pixels of one such phase. In the gradient
of weight a program owns a tile of filters x (taps and channels) and a run of pixels; the runs' sums are added
in order. So each sum has one owner and one order, and there are no atomics. Bytes moved: y and a residual
once, x once for each tile of filters, from the L2 cache where the tiles of a few pixels run side by side.
"""

import math

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.conv2d_tiles import (
    DIRECT,
    Geometry,
    add_product,
    depth_of,
    finish,
    index_of,
    is_direct,
    is_flat,
    load_pixels,
    options,
    pixels_of,
    place,
    runs_of,
    steps_of,
    through,
    tile_of,
    weight_tile_of,
)

# What a call may change without a kernel of its own.
_VARIABLE = [
    "batch", "height", "width", "rows", "columns", "stride_h", "stride_w", "padding_h", "padding_w",
    "dilation_h", "dilation_w", "apart_h", "apart_w", "pixels", "run",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARIABLE)
def _correlate_kernel(
    x, weight, scale, shift, residual, y, moments, batch, height, width, rows, columns, kernel_h, kernel_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, apart_h, apart_w, groups, depth,
    filters, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """y (batch, rows, columns, groups * filters) of x (batch, height, width, groups * depth).

    BACKWARD: x is dz and y is dx, so that depth counts weight's filters and filters its channels.
    """
    geometry = Geometry(
        kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, apart_h, apart_w
    )
    tile = tl.program_id(0)
    tiles = tl.cdiv(filters, N)
    filter = tile % tiles * N + tl.arange(0, N)
    known_filter = filter < filters
    tile //= tiles
    group = tile % groups
    tile //= groups
    pixels = pixels_of(tile, rows, columns, geometry, BACKWARD, INDEX, M)
    of_weight = kernel_h * kernel_w
    sums = tl.zeros((M, N), tl.float32)
    for step in range(steps_of(pixels.taps, depth, FLAT, D)):
        tap, channel, known = depth_of(step, pixels.taps, depth, FLAT, D)
        row, column, tap = through(pixels, tap, geometry)
        left = load_pixels(
            x + group * depth, pixels.image, row, column, height, width, groups * depth, channel,
            known & (pixels.image < batch),
        )  # fmt: skip
        if BACKWARD:
            at = ((group * depth + channel).to(tl.int64) * of_weight + tap) * filters + filter[:, None]
        else:
            at = ((group * filters + filter).to(tl.int64)[:, None] * of_weight + tap) * depth + channel
        right = tl.load(weight + at, mask=known & known_filter[:, None], other=0.0)  # (N, D)
        sums = add_product(sums, left, tl.trans(right))
    finish(
        sums, tile, pixels, group * filters + filter, known_filter, scale, shift, residual, y, moments, batch,
        rows, columns, groups * filters, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARIABLE)
def _direct_kernel(
    x, weight, scale, shift, residual, y, moments, batch, height, width, rows, columns, kernel_h, kernel_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, apart_h, apart_w, groups, depth,
    filters, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, INDEX: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The same without tensor cores: a tile's filters are of many groups."""
    geometry = Geometry(
        kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, apart_h, apart_w
    )
    tile = tl.program_id(0)
    tiles = tl.cdiv(groups * filters, N)
    filter = tile % tiles * N + tl.arange(0, N)
    known = filter < groups * filters
    tile //= tiles
    pixels = pixels_of(tile, rows, columns, geometry, BACKWARD, INDEX, M)
    of_weight = kernel_h * kernel_w
    sums = tl.zeros((M, N), tl.float32)
    for step in range(pixels.taps * depth):
        channel = filter // filters * depth + step % depth
        row, column, tap = through(pixels, step // depth, geometry)
        left = load_pixels(
            x, pixels.image, row, column, height, width, groups * depth, channel[None, :],
            known[None, :] & (pixels.image < batch),
        )  # fmt: skip
        if BACKWARD:
            at = (channel.to(tl.int64) * of_weight + tap) * filters + filter % filters
        else:
            at = (filter.to(tl.int64) * of_weight + tap) * depth + step % depth
        right = tl.load(weight + at, mask=known, other=0.0).to(tl.float32)
        sums = tl.fma(left.to(tl.float32), tl.broadcast_to(right[None, :], (M, N)), sums)
    finish(
        sums, tile, pixels, filter, known, scale, shift, residual, y, moments, batch, rows, columns,
        groups * filters, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARIABLE)
def _weight_kernel(
    dz, x, partial, height, width, rows, columns, pixels, run, kernel_h, kernel_w, stride_h, stride_w,
    padding_h, padding_w, dilation_h, dilation_w, groups, depth, filters,
    FLAT: tl.constexpr, INDEX: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The sums of each run of pixels, partial (runs, groups * filters, taps, depth)."""
    geometry = Geometry(
        kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, 1, 1
    )
    taps = kernel_h * kernel_w
    tile = tl.program_id(0)
    tiles = tl.cdiv(filters, N)
    filter = tile % tiles * N + tl.arange(0, N)
    known_filter = filter < filters
    tile //= tiles
    steps = steps_of(taps, depth, FLAT, D)
    tap, channel, known = depth_of(tile % steps, taps, depth, FLAT, D)
    tile //= steps
    group = tile % groups
    filter += group * filters
    tile //= groups
    begin = tile.to(INDEX) * run
    end = tl.minimum(begin + run, pixels)
    sums = tl.zeros((N, D), tl.float32)
    for first in range(begin, end, M):
        grad, seen = _seen(
            dz, x + group * depth, first, end, filter, known_filter, tap, channel, known, height, width, rows,
            columns, geometry, groups * filters, groups * depth, M,
        )  # fmt: skip
        sums = add_product(sums, tl.trans(grad), seen)
    at = (tile.to(tl.int64) * groups * filters + filter)[:, None] * taps * depth + tap * depth + channel
    tl.store(partial + at, sums, mask=known & known_filter[:, None])


@triton.jit(do_not_specialize=_VARIABLE)
def _direct_weight_kernel(
    dz, x, partial, height, width, rows, columns, pixels, run, kernel_h, kernel_w, stride_h, stride_w,
    padding_h, padding_w, dilation_h, dilation_w, groups, depth, filters,
    INDEX: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The same without tensor cores: a program owns one tap and channel of filters of many groups."""
    geometry = Geometry(
        kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, 1, 1
    )
    steps = kernel_h * kernel_w * depth
    tile = tl.program_id(0)
    tiles = tl.cdiv(groups * filters, N)
    filter = tile % tiles * N + tl.arange(0, N)
    known = filter < groups * filters
    tile //= tiles
    step = tile % steps
    tile //= steps
    channel = (filter // filters * depth + step % depth)[None, :]
    begin = tile.to(INDEX) * run
    end = tl.minimum(begin + run, pixels)
    sums = tl.zeros((M, N), tl.float32)
    for first in range(begin, end, M):
        grad, seen = _seen(
            dz, x, first, end, filter, known, step // depth, channel, known[None, :], height, width, rows,
            columns, geometry, groups * filters, groups * depth, M,
        )  # fmt: skip
        sums = tl.fma(grad.to(tl.float32), seen.to(tl.float32), sums)
    at = (tile.to(tl.int64) * groups * filters + filter) * steps + step
    tl.store(partial + at, tl.sum(sums, 0), mask=known)


@triton.jit
def _seen(
    dz, x, first, end, filter, known_filter, tap, channel, known, height, width, rows, columns, geometry,
    filters, channels, M: tl.constexpr,
):  # fmt: skip
    """dz of M pixels from the first on, (M, N), and what they see of x through a tap."""
    pixel = first + tl.arange(0, M)[:, None]
    inside = pixel < end
    at = pixel.to(tl.int64) * filters + filter[None, :]
    grad = tl.load(dz + at, mask=inside & known_filter[None, :], other=0.0)
    image, row, column = place(pixel, rows, columns)
    row = row * geometry.stride_h + (tap // geometry.kernel_w * geometry.dilation_h - geometry.padding_h)
    column = column * geometry.stride_w + (tap % geometry.kernel_w * geometry.dilation_w - geometry.padding_w)
    return grad, load_pixels(x, image, row, column, height, width, channels, channel, inside & known)


def forward(x, weight, scale, shift, residual, y, statistics, geometry, activation):
    """Convolution as csrc/conv2d.h has it: fills y and statistics.

    Args:
        x, residual, y: (N, H, W, C), (N, H', W', K) and the same, contiguous; residual or None.
        weight: (K, C / groups, R, S), any strides; copied unless it lies in channels_last.
        scale, shift: (K), float32, or None.
        statistics: (2, K) float32, the mean and the biased variance of y over all pixels, or None.
        geometry: stride, padding above and on the left, dilation, each of rows and columns; groups.
        activation: one of csrc/activation.h.
    """
    flags = {"ACTIVATION": activation, "BACKWARD": False}
    _correlate(x, weight, (scale, shift, residual), y, statistics, geometry, flags)


def _correlate(x, weight, epilogue, y, statistics, geometry, flags):
    """y of x; or BACKWARD, dx in y's place of dz in x's."""
    stride, padding, dilation, groups = geometry
    batch, *size, filters = y.shape
    filters, depth, kernel = filters // groups, x.shape[-1] // groups, weight.shape[2:]
    apart, phases, pixels = (1, 1), 1, batch * math.prod(size)
    if flags["BACKWARD"]:
        apart = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
        phases = math.prod(map(min, stride, size))
        pixels = batch * math.prod(map(triton.cdiv, size, stride))  # of the first phase, which has most
    if is_direct(filters, depth, groups):
        kernel_of, flags = _direct_kernel, {**flags, **DIRECT}
        tiles = triton.cdiv(groups * filters, flags["N"])
    else:
        flat = is_flat(math.prod(kernel), depth)
        tile = tile_of(pixels, filters, x.element_size(), flat)
        kernel_of, flags = _correlate_kernel, {**flags, "FLAT": flat, **options(tile)}
        tiles = groups * triton.cdiv(filters, tile.N)
    tiles_of_pixels = triton.cdiv(pixels, flags["M"])
    moments = None
    if statistics is not None:
        moments = statistics.new_empty(tiles_of_pixels, *statistics.shape)
    with torch.cuda.device_of(x):
        kernel_of[(tiles_of_pixels * phases * tiles,)](
            x, weight.contiguous(memory_format=torch.channels_last), *epilogue, y, moments, batch,
            *x.shape[1:3], *size, *kernel, *stride, *padding, *dilation, *apart, groups, depth, filters,
            INDEX=index_of(x, y), **flags,
        )  # fmt: skip
    if statistics is not None:
        _put_together(moments, statistics, pixels, flags["M"])


def _put_together(moments, statistics, pixels, block):
    """The statistics of all pixels from the moments of blocks, of which the last may be smaller."""
    mean, squares = moments.double().unbind(1)
    count = mean.new_full((len(mean), 1), block)
    count[-1] = pixels - (len(mean) - 1) * block
    center = (mean * count).sum(0) / pixels
    variance = (squares + (mean - center).square() * count).sum(0) / pixels
    statistics.copy_(torch.stack((center, variance)))


def backward(dz, x, weight, dx, dweight, geometry):
    """The gradients of the convolution without its epilogue, as csrc/conv2d.h has them: fills dx and dweight.

    Args:
        dz, x, dx: (N, H', W', K), (N, H, W, C) and the same, contiguous; dx or None.
        weight, dweight: (K, C / groups, R, S), any strides; dweight or None.
        geometry: as in `forward`.
    """
    if dx is not None and dx.numel():
        flags = {"ACTIVATION": 0, "BACKWARD": True}
        _correlate(dz, weight, (None, None, None), dx, None, geometry, flags)
    if dweight is not None:
        _weight_gradient(dz, x, dweight, geometry)


def _weight_gradient(dz, x, dweight, geometry):
    stride, padding, dilation, groups = geometry
    filters, depth, *kernel = dweight.shape
    pixels, taps, filters = dz.shape[:3].numel(), math.prod(kernel), filters // groups
    direct = is_direct(filters, depth, groups)
    if direct:
        tile = DIRECT
        tiles = taps * depth * triton.cdiv(groups * filters, tile["N"])
    else:
        tile = options(weight_tile_of(filters, x.element_size())) | {"FLAT": is_flat(taps, depth)}
        steps = triton.cdiv(taps * depth, tile["D"]) if tile["FLAT"] else taps * triton.cdiv(depth, tile["D"])
        tiles = groups * steps * triton.cdiv(filters, tile["N"])
    runs, run = runs_of(pixels, tiles, tile["M"])
    partial = x.new_empty(runs, groups * filters, *kernel, depth, dtype=torch.float32)
    with torch.cuda.device_of(x):
        (_direct_weight_kernel if direct else _weight_kernel)[(tiles * runs,)](
            dz, x, partial, *x.shape[1:3], *dz.shape[1:3], pixels, run,
            *kernel, *stride, *padding, *dilation, groups, depth, filters,
            INDEX=index_of(x, dz), **tile,
        )  # fmt: skip
    dweight.copy_(partial.sum(0).permute(0, 3, 1, 2))  # along the first dimension: in one order
