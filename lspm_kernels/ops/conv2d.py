"""Two-dimensional convolution with an epilogue: scale and shift, a residual, an activation."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, conv2d_checks, conv2d_scratch, dispatch
from lspm_kernels.conv2d_checks import ACTIVATIONS, FLOATS
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import conv2d as reference

# On a GPU cuda comes first: predicted, not measured.
BACKENDS = (
    Backend(
        "cpu", "cpu", FLOATS, compiled.cpu_kernel("conv2d_forward"), compiled.cpu_kernel("conv2d_backward"),
        compiled.nothing_missing,
    ),
    Backend(
        "cuda", "cuda", FLOATS[1:], conv2d_scratch.conv2d_forward, conv2d_scratch.conv2d_backward,
        compiled.cuda_missing,
    ),
)  # fmt: skip


def _rows(x):
    """(N, C, H, W) as contiguous (N, H, W, C), which a channels_last tensor is already."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _forward(row, x, weight, scale, shift, residual, size, geometry, activation, saves=True):
    out = x.new_empty(x.shape[0], *size, weight.shape[0])
    if row is not None and out.numel():
        residual = None if residual is None else _rows(residual)
        row.forward(_rows(x), weight, scale, shift, residual, out, _groups(geometry), activation)
    return out.permute(0, 3, 1, 2)


def _groups(geometry):
    """Stride, padding, dilation and groups, as the kernels take them."""
    return (geometry[:2], geometry[2:4], geometry[4:6], geometry[6])


def _backward(row, dz, x, weight, geometry, wants_dx, wants_dweight, saves=True):
    new = torch.empty_like if row is None or dz.numel() else torch.zeros_like
    dx = new(x, memory_format=torch.channels_last) if wants_dx else None
    dweight = new(weight) if wants_dweight else None
    if row is not None and dz.numel():
        views = [None if dx is None else dx.permute(0, 2, 3, 1), dweight]
        row.backward(_rows(dz), _rows(x), weight, *views, _groups(geometry))
    # An operator's outputs are tensors: an empty one stands for what is not wanted.
    return dz.new_empty(0) if dx is None else dx, dz.new_empty(0) if dweight is None else dweight


_conv_backward = Operator(
    "conv2d_backward(Tensor dz, Tensor x, Tensor weight, SymInt[] geometry, bool wants_dx,"
    " bool wants_dweight) -> (Tensor dx, Tensor dweight)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    x, weight, _, _, _, _, ctx.geometry, activation = inputs
    ctx.activation = ACTIVATIONS[activation]
    ctx.save_for_backward(x, weight, output if ctx.activation else None)


def _gradient(ctx, dy):
    x, weight, y = ctx.saved_tensors
    wants_dx, wants_dweight, _, wants_dshift, wants_dresidual = ctx.needs_input_grad[:5]
    dz = dy
    if ctx.activation == "relu":
        dz = torch.ops.aten.threshold_backward(dy, y, 0)
    elif ctx.activation == "relu6":
        dz = torch.ops.aten.hardtanh_backward(dy, y, 0, 6)
    dx = dweight = None
    if wants_dx or wants_dweight:
        dx, dweight = _conv_backward(ctx.row, dz, x, weight, ctx.geometry, wants_dx, wants_dweight)
    dshift = dz.sum((0, 2, 3), dtype=torch.float32) if wants_dshift else None
    return (
        dx if wants_dx else None, dweight if wants_dweight else None, None, dshift,
        dz if wants_dresidual else None, None, None, None,
    )  # fmt: skip


_conv = Operator(
    "conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[] size,"
    " SymInt[] geometry, int activation) -> Tensor",
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
        backend: "cpu", "cuda" or "reference"; None takes the first that admits the call.

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
        y = conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, activation=activation,
            residual=None if residual is None else residual.unsqueeze(0), scale=scale, shift=shift,
            backend=backend,
        )  # fmt: skip
        return y.squeeze(0)
    x, weight, residual = conv2d_checks.autocast(op, x, weight, residual)
    conv2d_checks.weight(op, x, weight, groups)
    kernel = tuple(weight.shape[2:])
    stride, dilation = (
        conv2d_checks.pair(op, *given, 1) for given in (("stride", stride), ("dilation", dilation))
    )
    first, added = conv2d_checks.padding(op, padding, kernel, stride, dilation)
    size = conv2d_checks.out_size(op, x, kernel, stride, added, dilation)
    filters = weight.shape[0]
    for name, t in (("bias", bias), ("scale", scale), ("shift", shift)):
        if t is not None:
            checks.parameter(op, name, t, filters, x.device, (*FLOATS, x.dtype))
    if residual is not None:
        _check_residual(op, residual, x, (x.shape[0], filters, *size))
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {names}, got {activation!r}")
    row = dispatch.pick(op, BACKENDS, backend, x)
    if row is None:
        return reference.conv2d(
            x, weight, bias, stride, padding, dilation, groups, activation, residual, scale, shift
        )
    geometry = (*stride, *first, *dilation, groups)
    records = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual, scale, shift)
    )
    if records and (scale is not None or activation in ("silu", "gelu")):
        z = _conv(row, x, weight, None, _float(bias), None, size, geometry, 0)
        return _epilogue(z, scale, shift, residual, activation)
    shift, scale = _float(shift), _float(scale)
    if bias is not None:
        moved = _float(bias) if scale is None else _float(bias) * scale
        shift = moved if shift is None else shift + moved
    return _conv(row, x, weight, scale, shift, residual, size, geometry, ACTIVATIONS.index(activation))


def _epilogue(z, scale, shift, residual, activation):
    """The epilogue where its gradient needs z."""
    y = z if scale is None else z * _float(scale).view(-1, 1, 1)
    if shift is not None:
        y = y + _float(shift).view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    return reference.ACTIVATIONS[activation](y).to(z.dtype)


def _float(t):
    return None if t is None else t.float().contiguous()


def _check_residual(op, residual, x, shape):
    if not isinstance(residual, Tensor) or tuple(residual.shape) != shape:
        raise ValueError(
            f"{op}: residual must be a tensor of y's shape {shape}, got {checks.shape(residual)}"
        )
    if residual.dtype != x.dtype:
        raise ValueError(f"{op}: residual must have x's dtype {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"{op}: residual must be on x's device {x.device}, got {residual.device}")
