"""The mean of every channel of channels-last images, on tiles of pixels by channels.

A program owns a tile of channels of one image: it adds up its pixels block by block, in the end
the block. The backward writes tiles of the means' gradients. Each element is read or written once.
"""

import torch
import triton
import triton.language as tl

_TILE = 2048  # elements: 16 a thread, with 4 warps
_CHANNELS = 32, 128  # of a tile, at least and at most


@triton.jit
def _forward_kernel(x, y, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[:, None]
        at = (image * pixels + pixel) * channels + channel[None, :]
        inside = (pixel < pixels) & (channel < channels)[None, :]
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / pixels
    tl.store(y + image * channels + channel, mean.to(y.dtype.element_ty), mask=channel < channels)


@triton.jit
def _backward_kernel(dy, dx, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    blocks = tl.cdiv(pixels, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mean = (
        tl.load(dy + image * channels + channel, mask=channel < channels, other=0.0).to(tl.float32) / pixels
    )
    inside = (pixel < pixels) & (channel < channels)
    mean = tl.broadcast_to(mean, (PIXELS, CHANNELS)).to(dx.dtype.element_ty)
    tl.store(dx + (image * pixels + pixel) * channels + channel, mean, mask=inside)


def forward(x, y):
    """Means over pixels; the contract is that of csrc/global_avg_pool.h.

    Args:
        x: (N, H, W, C), contiguous.
        y: (N, C, ...), contiguous.
    """
    if y.numel():
        N, H, W, C = x.shape
        tile = min(max(triton.next_power_of_2(C), _CHANNELS[0]), _CHANNELS[1])
        with torch.cuda.device_of(x):
            _forward_kernel[(N, triton.cdiv(C, tile))](x, y, H * W, C, PIXELS=_TILE // tile, CHANNELS=tile)


def backward(dy, dx):
    """The gradient: dy / (H * W) at each pixel of dx, (N, H, W, C)."""
    if dx.numel():
        N, H, W, C = dx.shape
        tile = min(max(triton.next_power_of_2(C), _CHANNELS[0]), _CHANNELS[1])
        grid = (N * triton.cdiv(H * W, _TILE // tile), triton.cdiv(C, tile))
        with torch.cuda.device_of(dx):
            _backward_kernel[grid](dy, dx, H * W, C, PIXELS=_TILE // tile, CHANNELS=tile)
