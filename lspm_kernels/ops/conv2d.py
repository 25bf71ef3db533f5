"""Two-dimensional convolution with an epilogue: scale and shift, a residual, an activation."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, conv2d_checks, conv2d_scratch, dispatch, triton
from lspm_kernels.conv2d_checks import ACTIVATIONS, FLOATS
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.ops.batch_norm_act import batch_norm_act
from lspm_kernels.recomputation import remade
from lspm_kernels.reference import conv2d as reference

# On a GPU cuda comes first: on an H200 with batch norm and gradients it takes 0.4 to 0.7 times as long. Alone
# triton's forward is as often the faster one, but with it ResNet-50's inference was slower.
BACKENDS = (
    Backend(
        "cpu", "cpu", FLOATS, compiled.cpu_kernel("conv2d_forward"), compiled.cpu_kernel("conv2d_backward"),
        compiled.nothing_missing,
    ),
    Backend(
        "cuda", "cuda", FLOATS[1:], conv2d_scratch.conv2d_forward, conv2d_scratch.conv2d_backward,
        compiled.cuda_missing,
    ),
    Backend(
        "triton", "cuda", FLOATS, triton.kernel("conv2d_forward"), triton.kernel("conv2d_backward"),
        triton.missing,
    ),
)  # fmt: skip


def _forward(
    row, x, weight, scale, shift, residual, size, geometry, activation, takes_statistics, saves=True
):
    out = conv2d_checks.empty_image(x, weight.shape[0], size)
    statistics = None
    if takes_statistics:
        new = x.new_empty if row is None or out.numel() else x.new_zeros
        statistics = new(2, weight.shape[0], dtype=torch.float32)
    if row is not None and out.numel():
        residual = None if residual is None else checks.pixels(residual)
        views = checks.pixels(x), weight, scale, shift, residual, checks.pixels(out), statistics
        row.forward(*views, conv2d_checks.grouped(geometry), activation)
    # An operator's outputs are tensors: an empty one stands for what is not wanted.
    return out, x.new_empty(0) if statistics is None else statistics


def _backward(row, dz, x, weight, geometry, wants_dx, wants_dweight, saves=True):
    new = torch.empty_like if row is None or dz.numel() else torch.zeros_like
    dx = new(x, memory_format=torch.channels_last) if wants_dx else None
    dweight = new(weight) if wants_dweight else None
    if row is not None and dz.numel():
        if wants_dweight and dweight.stride() != weight.stride():  # of a slice: the copy lies as dweight
            weight = weight.clone()
        views = [None if dx is None else dx.permute(0, 2, 3, 1), dweight]
        row.backward(checks.pixels(dz), checks.pixels(x), weight, *views, conv2d_checks.grouped(geometry))
    return dz.new_empty(0) if dx is None else dx, dz.new_empty(0) if dweight is None else dweight


_conv_backward = Operator(
    "conv2d_backward(Tensor dz, Tensor x, Tensor weight, SymInt[] geometry, bool wants_dx,"
    " bool wants_dweight) -> (Tensor dx, Tensor dweight)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    x, weight, _, _, _, _, ctx.geometry, activation, _ = inputs
    y, statistics = output
    ctx.activation = ACTIVATIONS[activation]
    # What a batch norm gave is computed again of what that has saved, rather than kept.
    ctx.make_x, kept = remade(x)
    ctx.save_for_backward(weight, y if ctx.activation else None, *kept)
    ctx.mark_non_differentiable(statistics)


def _gradient(ctx, dy, _):
    weight, y, *kept = ctx.saved_tensors
    wants_dx, wants_dweight, _, wants_dshift, wants_dresidual = ctx.needs_input_grad[:5]
    dz = dy
    if ctx.activation == "relu":
        dz = torch.ops.aten.threshold_backward(dy, y, 0)
    elif ctx.activation == "relu6":
        dz = torch.ops.aten.hardtanh_backward(dy, y, 0, 6)
    dx = dweight = None
    if wants_dx or wants_dweight:
        x = ctx.make_x(*kept) if wants_dweight else kept[0]
        dx, dweight = _conv_backward(ctx.row, dz, x, weight, ctx.geometry, wants_dx, wants_dweight)
    dshift = dz.sum((0, 2, 3), dtype=torch.float32) if wants_dshift else None
    return (
        dx if wants_dx else None, dweight if wants_dweight else None, None, dshift,
        dz if wants_dresidual else None, *[None] * 4,
    )  # fmt: skip


# convolve(row, x, weight, scale, shift, residual, (H', W'), geometry, activation, takes_statistics) gives y,
# and the mean and variance of its channels. Its gradient admits no scale and activations that show in y.
convolve = Operator(
    "conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[] size,"
    " SymInt[] geometry, int activation, bool takes_statistics) -> (Tensor y, Tensor statistics)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution as torch.nn.functional.conv2d, then what stands behind one in most models, in one pass:

        y = activation((conv(x, weight) + bias) * scale + shift + residual)

    Memory inside is channels_last: x and residual in that format are read where they lie, others are copied;
    y has it too. Sums are taken in float32.

    Args:
        x: (N, C, H, W) or (C, H, W), float32, bfloat16 or float16.
        weight: (K, C / groups, R, S), x's dtype.
        bias, scale, shift: (K,), x's dtype or float32. scale and shift may be a folded batch norm.
        stride, padding, dilation: an int, or one for rows and one for columns; padding also "same" or
            "valid".
        groups: C and K are split into as many; each part of K sees its part of C.
        activation: None, "relu", "relu6", "silu" or "gelu" (with erf).
        residual: y's shape and x's dtype.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (N, K, H', W') or (K, H', W'), x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or y would have no pixel.
        NotImplementedError: the backend asked for does not take this call.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).
    """
    op = "conv2d"
    conv2d_checks.image(op, x)
    if x.dim() == 3:
        if residual is not None and (not isinstance(residual, Tensor) or residual.dim() != 3):
            rule = "a tensor (K, H', W') beside x of three dimensions"
            raise ValueError(f"{op}: residual must be {rule}, got {checks.shape(residual)}")
        y = conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, activation=activation,
            residual=None if residual is None else residual.unsqueeze(0), scale=scale, shift=shift,
            backend=backend,
        )  # fmt: skip
        return y.squeeze(0)
    x, weight, residual = checks.autocast(x, weight, residual)
    size, geometry = conv2d_checks.geometry(op, x, weight, stride, padding, dilation, groups)
    filters = weight.shape[0]
    conv2d_checks.vectors(op, x, filters, bias=bias, scale=scale, shift=shift)
    conv2d_checks.residual(op, residual, x, (x.shape[0], filters, *size))
    code = conv2d_checks.activation(op, activation)
    row = dispatch.pick(op, BACKENDS, backend, x)
    if row is None:
        return reference.conv2d(
            x, weight, bias, stride, padding, dilation, groups, activation, residual, scale, shift
        )
    bias, scale, shift = (t if t is None else t.float().contiguous() for t in (bias, scale, shift))
    records = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual, scale, shift)
    )
    if records and (scale is not None or activation in ("silu", "gelu")):  # whose gradients need z
        z = convolve(row, x, weight, None, bias, None, size, geometry, 0, False)[0]
        return normalise(z, scale, shift, residual, activation, row.name)
    if bias is not None:
        moved = bias if scale is None else bias * scale
        shift = moved if shift is None else shift + moved
    return convolve(row, x, weight, scale, shift, residual, size, geometry, code, False)[0]


def normalise(z, scale, shift, residual, activation, backend):
    """The epilogue by itself: batch norm with constants in place of statistics."""
    zeros = torch.zeros(z.shape[1], dtype=torch.float32, device=z.device)
    return batch_norm_act(
        z, scale, shift, zeros, torch.ones_like(zeros), residual=residual, activation=activation, eps=0.0,
        backend=backend,
    )  # fmt: skip
