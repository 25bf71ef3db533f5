"""The mean of every channel of an image, channels last inside."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import global_avg_pool as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAST = torch.channels_last


# On a GPU both move the same bytes; cuda comes first because its launch costs less. Predicted, not measured.
BACKENDS = tuple(
    Backend(
        name, device, _FLOATS, kernel("global_avg_pool_forward"), kernel("global_avg_pool_backward"), missing
    )
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _forward(row, x, saves=True):
    y = x.new_empty(*x.shape[:2], 1, 1)
    if row is not None and y.numel():
        row.forward(checks.pixels(x), y)
    return y


def _backward(row, dy, height, width, saves=True):
    size = (*dy.shape[:2], height, width)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=_LAST)
    if row is not None and dx.numel():
        row.backward(dy.contiguous(), checks.pixels(dx))
    return dx


_pool_backward = Operator(
    "global_avg_pool_backward(Tensor dy, SymInt height, SymInt width) -> Tensor", BACKENDS, _backward
)


def _save(ctx, inputs, output):
    ctx.size = inputs[0].shape[2:]


def _gradient(ctx, dy):
    return (_pool_backward(ctx.row, dy, *ctx.size),)


_pool = Operator("global_avg_pool(Tensor x) -> Tensor", BACKENDS, _forward, _save, _gradient)


def global_avg_pool(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean of every channel of an image: y[n, c, 0, 0] = sum of x[n, c] / (H * W).

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16; sums are in float32. In channels_last memory it is
            read where it lies, in any other it is copied.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (N, C, 1, 1), x's dtype; NaN where H * W is 0, as in torch.

    Raises:
        ValueError: x has the wrong shape or dtype.
        NotImplementedError: the backend asked for does not take this call.

    Source: Lin, Chen and Yan, "Network In Network" (2014), section 3.2.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"global_avg_pool: x must be a floating-point tensor (N, C, H, W), got {checks.kind(x)}"
        )
    row = dispatch.pick("global_avg_pool", BACKENDS, backend, x)
    return reference.global_avg_pool(x) if row is None else _pool(row, x)
