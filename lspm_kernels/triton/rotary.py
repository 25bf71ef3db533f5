"""Rotary position embedding on tiles of heads by pairs, one read and one write per element.

A program owns one position of one sequence and a tile of its heads. The position's cosines and sines are read
once, as one row, and broadcast over the tile; interleaved pairs come apart in registers. Rows of more pairs
than a tile has columns are walked in blocks. Bytes per element of a two-byte dtype: 4.
"""

import torch
import triton
import triton.language as tl

_PAIRS = (
    1024  # of a tile, at most: with 4 warps a thread holds 8 pairs, 16 bytes of each half of a 2-byte dtype
)
_COLS = 256  # pairs of a row in a tile, at most


@triton.jit
def _angles(table, position, known, half, pair):
    """The row of a table as floats; NaN where the position is no row of it."""
    return tl.load(table + position * half + pair, mask=(pair < half) & known, other=float("nan")).to(
        tl.float32
    )


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "positions", "offset"])
def _rotary_kernel(
    x, cos, sin, offsets, out, batch_stride, head_stride, row_stride,
    heads, rows, dim, half, positions, offset,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    sequence, row = index // rows, index % rows
    position = row + (offset if offsets is None else tl.load(offsets + sequence))
    known = (position >= 0) & (position < positions)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    x += sequence * batch_stride + row * row_stride
    out += index * heads * dim
    x_at = head.to(tl.int64) * head_stride  # (HEADS, 1)
    out_at = head.to(tl.int64) * dim
    for start in range(0, half, COLS):
        pair = start + tl.arange(0, COLS)
        c = _angles(cos, position, known, half, pair)[None, :]
        s = _angles(sin, position, known, half, pair)[None, :]
        if INVERSE:
            s = -s
        if INTERLEAVED:
            col = (2 * start + tl.arange(0, 2 * COLS))[None, :]
            inside = (head < heads) & (col < 2 * half)
            both = _load(x, x_at + col, inside).to(tl.float32)
            a, b = tl.split(tl.reshape(both, (HEADS, COLS, 2)))
            turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * COLS))
            tl.store(out + out_at + col, turned.to(out.dtype.element_ty), mask=inside)
        else:
            col = pair[None, :]
            inside = (head < heads) & (col < half)
            a = _load(x, x_at + col, inside).to(tl.float32)
            b = _load(x, x_at + half + col, inside).to(tl.float32)
            tl.store(out + out_at + col, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
            tl.store(out + out_at + half + col, (b * c + a * s).to(out.dtype.element_ty), mask=inside)
    for start in range(2 * half, dim, COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        inside = (head < heads) & (col < dim)
        tl.store(out + out_at + col, _load(x, x_at + col, inside), mask=inside)


def forward(x, cos, sin, offsets, out, offset, interleaved):
    """Rotates the pairs of x; the contract is that of csrc/rotary.h.

    Args:
        x: (B, H, T, D), any strides with a contiguous last dimension.
        cos, sin: (S, half), contiguous, of x's dtype or float32.
        offsets: (B,) int64, the position of each sequence's row 0, or None.
        out: (B, T, H, D), contiguous.
        offset: the position of row 0 where offsets is None.
        interleaved: whether pair i is dimensions 2 i and 2 i + 1, or i and half + i.
    """
    _launch(x, cos, sin, offsets, out, offset, interleaved, inverse=False)


def backward(dout, cos, sin, offsets, dx, offset, interleaved):
    """The gradient: `forward` by the negative angle."""
    _launch(dout, cos, sin, offsets, dx, offset, interleaved, inverse=True)


def _launch(x, cos, sin, offsets, out, offset, interleaved, inverse):
    if x.numel() == 0:
        return
    B, H, T, D = x.shape
    S, half = cos.shape
    cols = min(triton.next_power_of_2(half), _COLS)
    heads = min(triton.next_power_of_2(H), _PAIRS // cols)
    warps = max(1, heads * cols // 256)  # 8 pairs a thread
    with torch.cuda.device_of(x):
        _rotary_kernel[(B * T, triton.cdiv(H, heads))](
            x, cos, sin, offsets, out, *x.stride()[:3], H, T, D, half, S, offset,
            INTERLEAVED=interleaved, INVERSE=inverse, HEADS=heads, COLS=cols, num_warps=warps,
        )  # fmt: skip
