"""Gated linear units on tiles of rows by columns, each element read and written once.

Rows of gate and up, and of their gradients, may lie any stride apart, as halves of one tensor do. Bytes per
element of a two-byte dtype: forward 6; backward 10, with y 12.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.bias_act import activated, cdf, load, slope, tile

_MOVED = 2048  # elements of a tile: 16 a thread


@triton.jit
def _rows(pointer, row, stride, col):
    return pointer + row[:, None] * stride + col[None, :]


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    gate, up, y, rows, cols, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    z = load(_rows(gate, row, gate_stride, col), 0, inside)
    value = activated(z, cdf(z, ACTIVATION), ACTIVATION) * load(_rows(up, row, up_stride, col), 0, inside)
    tl.store(_rows(y, row, cols, col), value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, gate, up, dgate, dup, y, rows, cols, gate_stride, up_stride, dgate_stride, dup_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    grad = load(_rows(dy, row, cols, col), 0, inside)
    z = load(_rows(gate, row, gate_stride, col), 0, inside)
    factor = load(_rows(up, row, up_stride, col), 0, inside)
    c = cdf(z, ACTIVATION)
    value = activated(z, c, ACTIVATION)
    dz = grad * factor * slope(z, c, ACTIVATION)
    tl.store(_rows(dgate, row, dgate_stride, col), dz.to(dgate.dtype.element_ty), mask=inside)
    tl.store(_rows(dup, row, dup_stride, col), (grad * value).to(dup.dtype.element_ty), mask=inside)
    if y is not None:
        tl.store(_rows(y, row, cols, col), (value * factor).to(y.dtype.element_ty), mask=inside)


def _halves(gate, up, cols):
    """gate and up as (rows, cols), two views of one tensor where up is None."""
    if up is None:
        gate, up = gate[..., :cols], gate[..., cols:]
    return gate.view(-1, cols), up.view(-1, cols)


def forward(gate, up, y, activation):
    """y = activation(gate) * up; the contract is that of csrc/swiglu.h.

    Args:
        gate, up: (..., cols) with rows that are contiguous and equally far apart; without up, gate is
            (..., 2 cols), one and then the other.
        y: (..., cols), contiguous.
        activation: its number in csrc/activation.h.
    """
    cols = y.shape[-1]
    rows, moved = y.numel() // cols, tile(cols, _MOVED)
    gate, up = _halves(gate, up, cols)
    grid = (triton.cdiv(rows, moved["ROWS"]), triton.cdiv(cols, moved["COLS"]))
    with torch.cuda.device_of(y):
        _forward_kernel[grid](
            gate, up, y, rows, cols, gate.stride(0), up.stride(0), ACTIVATION=activation, **moved
        )


def backward(dy, gate, up, dgate, dup, y, activation):
    """The gradients of `forward`, and its output again.

    Args:
        dy, y: (..., cols), contiguous; y None where it is not wanted.
        gate, up, dgate, dup: as gate and up in the forward.
    """
    cols = dy.shape[-1]
    rows, moved = dy.numel() // cols, tile(cols, _MOVED)
    four = (*_halves(gate, up, cols), *_halves(dgate, dup, cols))
    grid = (triton.cdiv(rows, moved["ROWS"]), triton.cdiv(cols, moved["COLS"]))
    with torch.cuda.device_of(dy):
        _backward_kernel[grid](
            dy, *four, y, rows, cols, *(t.stride(0) for t in four), ACTIVATION=activation, **moved
        )
