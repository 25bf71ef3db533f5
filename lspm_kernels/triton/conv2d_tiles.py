"""What the Triton kernels of conv2d share: places of pixels, taps and channels, activations, and tiles."""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit, and all
# of them store theirs to one shared address: the result would depend on which lane comes last. The products
# of tiles are fused nevertheless.
_EXACT = {"enable_fp_fusion": False}
_RELU, _RELU6, _SILU, _GELU = map(tl.constexpr, range(1, 5))  # csrc/activation.h


class Geometry(NamedTuple):
    """How taps lie over an image, of rows and columns."""

    kernel_h: object
    kernel_w: object
    stride_h: object
    stride_w: object
    padding_h: object
    padding_w: object
    dilation_h: object
    dilation_w: object
    apart_h: object  # from one tap to the next that reaches the same pixels of x: 1 in the forward
    apart_w: object


class Pixels(NamedTuple):
    """The pixels (M, 1) of a tile, and the taps that reach them."""

    image: object
    row: object
    column: object
    taps_w: object
    taps: object
    first: object  # the place of the first tap in weight
    from_row: object  # what they see through that
    from_column: object
    move_h: object  # from there to what they see through the next
    move_w: object


@triton.jit
def place(pixel, rows, columns):
    """The image, row and column of pixels counted through all images."""
    row = pixel // columns
    return row // rows, row % rows, pixel % columns


@triton.jit
def reaching(phase, taps, stride, dilation, apart):
    """The first of the taps that reach pixels whose place is `phase` modulo stride, and how many do."""
    first = taps
    for tap in range(0, tl.minimum(apart, taps)):
        if (phase - tap * dilation) % stride == 0:
            first = tap
    return first, tl.cdiv(taps - first, apart)


@triton.jit
def pixels_of(tile, rows, columns, g, BACKWARD: tl.constexpr, INDEX: tl.constexpr, M: tl.constexpr):
    """The pixels of a tile; BACKWARD: of x, and they see dz, all of one phase through the same taps."""
    if BACKWARD:
        phases_w = tl.minimum(g.stride_w, columns)
        phases = tl.minimum(g.stride_h, rows) * phases_w
        phase_h = tile % phases // phases_w
        phase_w = tile % phases_w
        first_h, taps_h = reaching(phase_h + g.padding_h, g.kernel_h, g.stride_h, g.dilation_h, g.apart_h)
        first_w, taps_w = reaching(phase_w + g.padding_w, g.kernel_w, g.stride_w, g.dilation_w, g.apart_w)
        rows = tl.cdiv(rows - phase_h, g.stride_h)
        columns = tl.cdiv(columns - phase_w, g.stride_w)
        image, from_row, from_column = place(
            (tile // phases).to(INDEX) * M + tl.arange(0, M)[:, None], rows, columns
        )
        row = phase_h + from_row * g.stride_h
        column = phase_w + from_column * g.stride_w
        from_row += (phase_h + g.padding_h - first_h * g.dilation_h) // g.stride_h  # divisible
        from_column += (phase_w + g.padding_w - first_w * g.dilation_w) // g.stride_w
        move_h = -(g.apart_h * g.dilation_h // g.stride_h)
        move_w = -(g.apart_w * g.dilation_w // g.stride_w)
        first = first_h * g.kernel_w + first_w
        taps = taps_h * taps_w
        taps_w = tl.maximum(taps_w, 1)  # a divisor, even where there is no tap
    else:
        image, row, column = place(tile.to(INDEX) * M + tl.arange(0, M)[:, None], rows, columns)
        from_row = row * g.stride_h - g.padding_h
        from_column = column * g.stride_w - g.padding_w
        move_h, move_w, first, taps_w = g.dilation_h, g.dilation_w, 0, g.kernel_w
        taps = g.kernel_h * g.kernel_w
    return Pixels(image, row, column, taps_w, taps, first, from_row, from_column, move_h, move_w)


@triton.jit
def through(pixels, tap, g):
    """The rows and columns that pixels see through a tap, and its place in weight."""
    r = tap // pixels.taps_w
    s = tap % pixels.taps_w
    at = pixels.first + r * g.apart_h * g.kernel_w + s * g.apart_w
    return pixels.from_row + r * pixels.move_h, pixels.from_column + s * pixels.move_w, at


@triton.jit
def load_pixels(x, image, row, column, height, width, pitch, channel, inside):
    """Channels of pixels; 0 outside of the image."""
    inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = (image * height + row) * width + column
    return tl.load(x + pixel.to(tl.int64) * pitch + channel, mask=inside, other=0.0)


@triton.jit
def steps_of(taps, depth, FLAT: tl.constexpr, D: tl.constexpr):
    """How many steps of D lead through taps and channels."""
    if FLAT:
        steps = tl.cdiv(taps * depth, D)
    else:
        steps = taps * tl.cdiv(depth, D)
    return steps


@triton.jit
def depth_of(step, taps, depth, FLAT: tl.constexpr, D: tl.constexpr):
    """The tap and the channels (1, D) of a step, and which of them there are.

    FLAT: the channels of all taps lie side by side, and each has its tap, (1, D).
    """
    at = tl.arange(0, D)[None, :]
    if FLAT:
        at += step * D
        tap = at // depth
        channel = at % depth
        known = tap < taps
    else:
        blocks = tl.cdiv(depth, D)
        tap = step // blocks
        channel = step % blocks * D + at
        known = channel < depth
    return tap, channel, known


@triton.jit
def add_product(sums, left, right):
    """sums + left right; "tf32" would keep 10 bits of a float32: 2^13 times the error of plain PyTorch."""
    if left.dtype == tl.float32:
        # Block by block, as one sum over the whole depth gathers twice the error. By fma, because Triton
        # makes of a plain addition just that one sum.
        sums = tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, sums)
    else:
        sums = tl.dot(left, right, sums)
    return sums


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == _RELU:
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == _RELU6:
        z = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACTIVATION == _SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == _GELU:
        z = 0.5 * z * (1.0 + libdevice.erf(z * 0.7071067811865476))
    return z


@triton.jit
def finish(
    sums, tile, pixels, filter, known, scale, shift, residual, y, moments, batch, rows, columns, pitch,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores the sums of pixels and filters (N), of which some are known, with the epilogue.

    moments: (tiles, 2, pitch), the mean of each filter over a tile's pixels and the squared deviations.
    """
    if scale is not None:
        sums *= tl.load(scale + filter, mask=known, other=0.0)[None, :]
    if shift is not None:
        sums += tl.load(shift + filter, mask=known, other=0.0)[None, :]
    pixel = (pixels.image * rows + pixels.row) * columns + pixels.column
    at = pixel.to(tl.int64) * pitch + filter[None, :]
    inside = (pixels.image < batch) & known[None, :]
    if residual is not None:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    out = activated(sums, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + at, out, mask=inside)
    if moments is not None:
        out = tl.where(inside, out.to(tl.float32), 0.0)
        mean = tl.sum(out, 0) / tl.sum((pixels.image < batch).to(tl.float32))
        deviation = tl.where(inside, out - mean[None, :], 0.0)
        moments += tile.to(tl.int64) * 2 * pitch + filter
        tl.store(moments, mean, mask=known)
        tl.store(moments + pitch, tl.sum(deviation * deviation, 0), mask=known)


class Tile(NamedTuple):
    """Pixels, filters and depth of a tile, and how a program works on it."""

    M: int
    N: int
    D: int
    num_warps: int
    num_stages: int


# By the bytes of an element and the filters, of which a narrower group takes the next power of two. What no
# compiler tried spills, and whose stages let two programs share the 163 KiB of shared memory of sm_80.
# Predicted to be fast, not measured.
CORRELATE = {
    (2, 128): Tile(128, 128, 32, 8, 4),
    (2, 64): Tile(128, 64, 32, 4, 4),
    (2, 32): Tile(128, 32, 32, 4, 4),
    (2, 16): Tile(128, 16, 32, 4, 4),
    (4, 64): Tile(64, 64, 16, 8, 2),
    (4, 32): Tile(64, 32, 16, 4, 2),
    (4, 16): Tile(64, 16, 16, 4, 2),
}
DIRECT = {"M": 64, "N": 32, "num_warps": 4, **_EXACT}  # 16 sums a thread
WEIGHT = {
    (2, 128): Tile(32, 128, 64, 8, 4),
    (2, 64): Tile(32, 64, 64, 4, 4),
    (2, 32): Tile(32, 32, 64, 4, 4),
    (2, 16): Tile(32, 16, 64, 4, 4),
    (4, 64): Tile(16, 64, 32, 8, 2),
    (4, 32): Tile(16, 32, 32, 4, 2),
    (4, 16): Tile(16, 16, 32, 4, 2),
}
_PROGRAMS = 132  # of an H100's multiprocessors: with fewer, tiles of half as many pixels
_RUNNING = 264  # two a multiprocessor: so many programs share the pixels of weight's gradient
_BLOCKS = 8  # of pixels, at least, in a run, which writes a sum for each product of a block's
_REGISTERS = 65536  # of a multiprocessor


def tile_of(pixels, filters, itemsize, flat):
    """The tile for the products of so many pixels and filters."""
    tile = CORRELATE[itemsize, _width(filters, itemsize)]
    few = triton.cdiv(pixels, tile.M) * triton.cdiv(filters, tile.N) < _PROGRAMS
    return tile._replace(M=64) if few or flat else tile  # flat ones have an address for each element


def weight_tile_of(filters, itemsize):
    """The tile for weight's gradient."""
    return WEIGHT[itemsize, _width(filters, itemsize)]


def _width(filters, itemsize):
    return min(128 if itemsize == 2 else 64, max(16, triton.next_power_of_2(filters)))


def options(tile):
    """A tile as a kernel's options."""
    # Left to itself, ptxas aims at one more block per multiprocessor and spills for it.
    return {**tile._asdict(), "maxnreg": min(255, _REGISTERS // (32 * tile.num_warps)), **_EXACT}


def runs_of(pixels, tiles, block):
    """How many runs share the pixels, and the pixels of one, in whole blocks: told by the shape alone."""
    runs = max(1, min(triton.cdiv(_RUNNING, tiles), pixels // (_BLOCKS * block)))
    run = triton.cdiv(triton.cdiv(pixels, runs), block) * block
    return triton.cdiv(pixels, run), run


def is_direct(filters, channels, groups):
    """Whether so few filters and channels of a group meet that a tensor core's tile would lie idle."""
    return groups > 1 and filters * channels < 16


def is_flat(taps, depth):
    """Whether the channels of one tap do not fill a tile."""
    return taps > 1 and depth < 16


def index_of(*images):
    """The type that counts all pixels of images, of the last tile too."""
    most = max(image.shape[:3].numel() for image in images)
    return tl.int64 if most >= 2**31 - 2**16 else tl.int32
