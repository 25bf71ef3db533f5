"""Linear for few rows: bound by reading the weight, tile by tile, once.

A program owns OUTPUTS rows of the weight and walks their columns. Each weight that a thread holds meets all
rows of x, in float32; what a thread adds up meets that of others at the end only. With up to 8 rows that is
less work than reading, so tensor cores, which take 16, would bring nothing.
"""

import torch
import triton
import triton.language as tl

_OUTPUTS, _COLUMNS = 8, 128  # of a tile: 8 weights a thread, one load of 16 bytes where they are halves
_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, bias, scales, y, rows, outputs, inputs, weight_stride, groups,
    GROUPED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = output < outputs
    w = weight + output.to(tl.int64)[:, None] * weight_stride + column[None, :]
    a = x + row[:, None] * inputs + column[None, :]
    parts = tl.zeros((ROWS, OUTPUTS, COLUMNS), tl.float32)
    for start in range(0, inputs, COLUMNS):
        inside = (column < inputs - start)[None, :]
        tile = tl.load(w + start, mask=inside & exists[:, None], other=0).to(tl.float32)
        if GROUPED:
            group = start // (inputs // groups)
            tile *= tl.load(scales + output * groups + group, mask=exists, other=0.0)[:, None]
        of_x = tl.load(a + start, mask=(row < rows)[:, None] & inside, other=0.0).to(tl.float32)
        parts += of_x[:, None, :] * tile[None, :, :]
    sums = tl.sum(parts, 2)
    if scales is not None and not GROUPED:
        sums *= tl.load(scales + output, mask=exists, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & exists[None, :])


def forward(x, weight, bias, scales, y):
    """x @ weight.T + bias; the contract is that of csrc/linear.h.

    Args:
        x: (..., inputs), contiguous, of few rows.
        weight: (outputs, inputs), rows contiguous.
        bias: (outputs,), or None.
        scales: (outputs, groups) float32, or None.
        y: (..., outputs), contiguous.
    """
    if not y.numel():
        return
    outputs, inputs = weight.shape
    rows = y.numel() // outputs
    groups, columns = 1 if scales is None else scales.shape[1], _COLUMNS
    if groups > 1:  # a tile lies in one group: it has the largest power of two that divides the group's
        group = inputs // groups
        columns = min(group & -group, columns)
    given = (x, weight, bias, scales, y, rows, outputs, inputs, weight.stride(0), groups)
    tile = {
        "ROWS": triton.next_power_of_2(rows),
        "OUTPUTS": _OUTPUTS * _COLUMNS // columns,
        "COLUMNS": columns,
    }
    grid = (triton.cdiv(outputs, tile["OUTPUTS"]),)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](*given, GROUPED=groups > 1, **tile, num_warps=_WARPS)
