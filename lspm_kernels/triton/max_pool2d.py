"""Max pooling of channels-last images on tiles of pixels by channels.

A program owns a tile of y, and of dx in the backward, and walks the taps of its windows, or the windows that
reach its pixels: all accesses are along channels, and what windows share comes from the caches. The backward
gathers in the order of the windows, without atomics.
"""

import torch
import triton
import triton.language as tl

_TILE = 1024  # elements: 8 a thread, with 4 warps, each with addresses of its own in two tensors
_CHANNELS = 128  # of a tile, at most


@triton.jit
def _tile(pixels, channels, rows, cols, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, row and column of the pixels of a tile, its channels, and which of both exist."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    image, row, col = pixel // (rows * cols), pixel // cols % rows, pixel % cols
    return pixel, image, row, col, channel, pixel < pixels, channel < channels


@triton.jit
def _first_tap(start, DILATION: tl.constexpr):
    """The first tap of a window that does not lie before the image."""
    return tl.where(start < 0, (DILATION - 1 - start) // DILATION, 0).to(tl.int32)


@triton.jit
def _forward_kernel(
    x, y, positions, pixels, channels, height, width, out_height, out_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel, image, row, col, channel, exists, has_channel = _tile(
        pixels, channels, out_height, out_width, PIXELS, CHANNELS
    )
    top, left = row * STRIDE_H - PADDING_H, col * STRIDE_W - PADDING_W
    best = tl.full((PIXELS, CHANNELS), float("-inf"), tl.float32)
    first = _first_tap(top, DILATION_H) * KERNEL_W + _first_tap(left, DILATION_W)
    taken = tl.zeros((PIXELS, CHANNELS), tl.int32) + first
    for a in range(KERNEL_H):
        for b in range(KERNEL_W):
            i, j = top + a * DILATION_H, left + b * DILATION_W
            inside = exists & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            at = ((image * height + i) * width + j) * channels + channel
            value = tl.load(x + at, mask=inside & has_channel, other=float("-inf")).to(tl.float32)
            larger = (value > best) | (value != value)  # noqa: PLR0124
            best = tl.where(larger, value, best)
            taken = tl.where(larger, a * KERNEL_W + b, taken)
    at = pixel * channels + channel
    tl.store(y + at, best.to(y.dtype.element_ty), mask=exists & has_channel)
    if positions is not None:
        tl.store(positions + at, taken.to(positions.dtype.element_ty), mask=exists & has_channel)


@triton.jit
def _first_window(element, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first window that may reach an element, counted with the padding."""
    before = element - (KERNEL - 1) * DILATION
    return tl.where(before > 0, (before + STRIDE - 1) // STRIDE, 0)


@triton.jit
def _backward_kernel(
    dy, positions, dx, pixels, channels, height, width, out_height, out_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel, image, row, col, channel, exists, has_channel = _tile(
        pixels, channels, height, width, PIXELS, CHANNELS
    )
    row, col = row + PADDING_H, col + PADDING_W
    first_row = _first_window(row, KERNEL_H, STRIDE_H, DILATION_H)
    first_col = _first_window(col, KERNEL_W, STRIDE_W, DILATION_W)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for u in range((KERNEL_H - 1) * DILATION_H // STRIDE_H + 1):
        for v in range((KERNEL_W - 1) * DILATION_W // STRIDE_W + 1):
            i, j = first_row + u, first_col + v
            down, right = row - i * STRIDE_H, col - j * STRIDE_W
            reaches = exists & (i < out_height) & (j < out_width) & (down >= 0) & (right >= 0)
            reaches = reaches & (down % DILATION_H == 0) & (right % DILATION_W == 0)
            tap = (down // DILATION_H * KERNEL_W + right // DILATION_W).to(tl.int32)
            at = ((image * out_height + i) * out_width + j) * channels + channel
            inside = reaches & has_channel
            taken = tl.load(positions + at, mask=inside, other=0).to(tl.int32)
            gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(inside & (taken == tap), gradient, 0.0)
    tl.store(dx + pixel * channels + channel, total.to(dx.dtype.element_ty), mask=exists & has_channel)


def forward(x, y, positions, window):
    """The largest elements of windows; the contract is that of csrc/max_pool2d.h.

    Args:
        x, y: (N, H, W, C), contiguous.
        positions: of y's shape, uint8 or int32, or None.
        window: kernel, stride, padding and dilation, each of rows and of columns.
    """
    _launch(_forward_kernel, (x, y, positions), y, x.shape[1:3], y.shape[1:3], window)


def backward(dy, positions, dx, window):
    """The gradient of x, from what `forward` took."""
    _launch(_backward_kernel, (dy, positions, dx), dx, dx.shape[1:3], dy.shape[1:3], window)


def _launch(kernel, tensors, owned, size, out, window):
    """Runs a kernel whose programs own tiles of one tensor."""
    if owned.numel() == 0:
        return
    channels = owned.shape[3]
    pixels = owned.numel() // channels
    tile = min(triton.next_power_of_2(channels), _CHANNELS)
    grid = (triton.cdiv(pixels, _TILE // tile), triton.cdiv(channels, tile))
    with torch.cuda.device_of(owned):
        kernel[grid](*tensors, pixels, channels, *size, *out, *window, PIXELS=_TILE // tile, CHANNELS=tile)
