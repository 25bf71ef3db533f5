"""Max pooling of images, channels last inside."""

from functools import partial

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, conv2d_checks, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import max_pool2d as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAST = torch.channels_last


# On a GPU both move the same bytes; cuda comes first because its launch costs less. Predicted, not measured.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("max_pool2d_forward"), kernel("max_pool2d_backward"), missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _forward(row, x, size, window, positioned, saves=True):
    out = [*x.shape[:2], *size]
    y, positions = _empty(x, out, x.dtype), None
    if saves or positioned:
        dtype = torch.uint8 if window[0] * window[1] <= 256 else torch.int32
        positions = _empty(x, out, dtype)
    if row is not None and y.numel():
        row.forward(
            checks.pixels(x),
            checks.pixels(y),
            None if positions is None else checks.pixels(positions),
            window,
        )
    return y, positions


def _backward(row, dy, positions, size, window, saves=True):
    dx = _empty(dy, [*dy.shape[:2], *size], dy.dtype)
    if row is not None and dx.numel():
        row.backward(checks.pixels(dy), checks.pixels(positions), checks.pixels(dx), window)
    return dx


def _empty(like, size, dtype):
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=_LAST)


def _windows(n, kernel, stride, padding, dilation, ceil_mode):
    """Those along a dimension of n; the last one must begin within the input or the padding before it."""
    room = n + 2 * padding - dilation * (kernel - 1) - 1
    windows = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return windows - 1 if ceil_mode and (windows - 1) * stride >= n + padding else windows


def _pairs(window):
    """Kernel, stride, padding and dilation, each of rows and of columns."""
    return window[:2], window[2:4], window[4:6], window[6:]


_pool_backward = Operator(
    "max_pool2d_backward(Tensor dy, Tensor positions, SymInt[] size, int[] window) -> Tensor",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    x, _, ctx.window, _ = inputs
    positions = output[1]
    ctx.size = x.shape[2:]
    ctx.save_for_backward(positions)
    ctx.mark_non_differentiable(positions)


def _gradient(ctx, dy, _):
    return _pool_backward(ctx.row, dy, ctx.saved_tensors[0], ctx.size, ctx.window), None, None, None


_pool = Operator(
    "max_pool2d(Tensor x, SymInt[] size, int[] window, bool positioned) -> (Tensor y, Tensor positions)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest element of each window of an image: torch.nn.functional.max_pool2d.

    y[..., i, j] = max over a, b of x[..., i * stride - padding + a * dilation, ...]

    A NaN is larger than all else. For the backward a byte is kept for each element of y, which says what was
    taken (four bytes for windows of more than 256 elements); each element of x then adds up the gradients of
    the windows that took it, in their order.

    Args:
        x: (N, C, H, W) or (C, H, W), float32, bfloat16 or float16. In channels_last memory it is read where
            it lies, in any other it is copied.
        kernel_size, stride, padding, dilation: of rows and columns, or one number for both; stride None is
            kernel_size. padding is at most half of kernel_size.
        ceil_mode: whether a last window that reaches past the padding counts.
        return_indices: also where in the plane of H * W elements each maximum lies.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (N, C, H', W') in channels_last memory, or (C, H', W'), x's dtype; (y, indices), int64 of y's
        shape, with return_indices. Of equal elements the first has the index, of NaNs the last, as in torch.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: the backend asked for does not take this call.
    """
    size, window = _check(x, kernel_size, stride, padding, dilation, ceil_mode)
    row = dispatch.pick("max_pool2d", BACKENDS, backend, x)
    if row is None:
        return reference.max_pool2d(
            x, *_pairs(window), ceil_mode=bool(ceil_mode), return_indices=bool(return_indices)
        )
    images = x if x.dim() == 4 else x[None]
    y, positions = _pool(row, images, size, window, bool(return_indices))
    if x.dim() == 3:
        y = y[0]
    if not return_indices:
        return y
    indices = _indices(positions, x.shape[-1], window)
    return y, indices if x.dim() == 4 else indices[0]


def _indices(positions, width, window):
    """Taps of windows as places in a plane."""
    kernel, stride, padding, dilation = _pairs(window)
    taps = positions.to(torch.int64)
    places = []
    for d, tap in enumerate((taps // kernel[1], taps % kernel[1])):
        start = torch.arange(taps.shape[2 + d], device=taps.device) * stride[d] - padding[d]
        places.append((start[:, None] if d == 0 else start) + tap * dilation[d])
    return places[0] * width + places[1]


def _check(x, kernel_size, stride, padding, dilation, ceil_mode):
    """Checks all arguments; gives (H', W') and kernel, stride, padding and dilation as eight numbers."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4) or not x.is_floating_point() or 0 in x.shape[-3:]:
        raise ValueError(
            f"max_pool2d: x must be a floating-point tensor (N, C, H, W) or (C, H, W), where only N may be 0,"
            f" got {checks.kind(x)}"
        )
    pair = partial(conv2d_checks.pair, "max_pool2d")
    kernel = pair("kernel_size", kernel_size, 1)
    defaults = stride is None or (isinstance(stride, tuple | list) and not stride)
    stride = kernel if defaults else pair("stride", stride, 1)
    padding, dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
    if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        raise ValueError(f"max_pool2d: padding must be at most half of kernel_size {kernel}, got {padding}")
    size = tuple(
        _windows(x.shape[i - 2], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in range(2)
    )
    if min(size) < 1:
        raise ValueError(
            f"max_pool2d: kernel_size must fit into x with its padding, got {kernel} with dilation {dilation}"
            f" for {tuple(x.shape)}"
        )
    return size, (*kernel, *stride, *padding, *dilation)
