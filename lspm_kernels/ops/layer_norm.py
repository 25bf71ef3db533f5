"""Layer norm and RMS norm over the last dimension, alone or behind a residual addition."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import layer_norm as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RUNS = 256  # partial sums of the weights' gradients, at most; csrc/layer_norm.h says what they are for
# At least, so that a run's own sum is cheap beside its rows; a GPU needs more runs to be busy.
_ROWS_A_RUN = {"cpu": 64, "cuda": 16}


# On a GPU cuda comes first: on an H200 half as long with the gradient, 1.5 times for a wide forward alone.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("layer_norm_forward"), kernel("layer_norm_backward"), missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _add_forward(row, x, residual, weight, bias, eps, centered, saves=True):
    x = x.contiguous()
    y, total, statistics = torch.empty_like(x), None, None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    if saves or not x.is_cpu:
        statistics = x.new_empty(2 if centered else 1, _rows(x), dtype=torch.float32)
    if row is not None and x.numel():
        weight, bias = _contiguous(weight), _contiguous(bias)
        row.forward(x, residual, weight, bias, total, y, statistics, eps, centered)
    return y, total, statistics


def _forward(row, x, weight, bias, eps, centered, saves=True):
    y, _, statistics = _add_forward(row, x, None, weight, bias, eps, centered, saves)
    return y, statistics


def _backward(row, dy, dsum, total, statistics, weight, bias, wants_dweight, centered, saves=True):
    dy = dy.contiguous()
    dx = torch.empty_like(dy)
    new = Tensor.new_empty if row is None or dy.numel() else Tensor.new_zeros
    dweight = new(weight, weight.shape) if wants_dweight else None  # contiguous, whatever weight is
    dbias = None if bias is None else new(bias, bias.shape)
    if row is not None and dy.numel():
        dsum, weight = _contiguous(dsum), _contiguous(weight)
        runs = min(_RUNS, -(-_rows(dy) // _ROWS_A_RUN[row.device]))
        partial = statistics.new_empty(runs, 2, dy.shape[-1])
        row.backward(dy, dsum, total, statistics, weight, dx, dweight, dbias, partial, centered)
    # An operator's outputs are tensors: an empty one stands for what is not wanted.
    return dx, dy.new_empty(0) if dweight is None else dweight, dy.new_empty(0) if dbias is None else dbias


def _contiguous(t):
    return None if t is None else t.contiguous()


def _rows(x):
    return x.numel() // max(x.shape[-1], 1)


norm_backward = Operator(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor statistics, Tensor? weight,"
    " Tensor? bias, bool wants_dweight, bool centered) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    BACKENDS,
    _backward,
)


def _add_save(ctx, inputs, output):
    _, _, weight, bias, _, ctx.centered = inputs
    _, total, statistics = output
    ctx.save_for_backward(total, statistics, weight, bias)
    ctx.mark_non_differentiable(statistics)


def _save(ctx, inputs, output):
    x, *rest = inputs
    y, statistics = output
    _add_save(ctx, (x, None, *rest), (y, x.contiguous(), statistics))


def _add_gradient(ctx, dy, dsum, _):
    return _gradients(ctx, dy, dsum, *ctx.needs_input_grad[2:4])


def _gradient(ctx, dy, _):
    dx, _, *rest = _gradients(ctx, dy, None, *ctx.needs_input_grad[1:3])
    return dx, *rest


def _gradients(ctx, dy, dsum, wants_dweight, wants_dbias):
    if dy is None:
        return dsum, dsum, None, None, None, None
    total, statistics, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = norm_backward(
        ctx.row,
        dy,
        dsum,
        total,
        statistics,
        weight,
        bias if wants_dbias else None,
        wants_dweight,
        ctx.centered,
    )
    return dx, dx, dweight if wants_dweight else None, dbias if wants_dbias else None, None, None


_norm = Operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered)"
    " -> (Tensor y, Tensor statistics)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)

_add_norm = Operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool centered)"
    " -> (Tensor y, Tensor sum, Tensor statistics)",
    BACKENDS,
    _add_forward,
    _add_save,
    _add_gradient,
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer norm over the last dimension: y = (x - mean) / sqrt(variance + eps) * weight + bias.

    Args:
        x: (..., C), float32, bfloat16 or float16. Statistics are taken in float32.
        weight, bias: (C,), x's dtype or float32, or None.
        eps: added to the variance.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (..., C), x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: the backend asked for does not take this call.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    x, weight, bias = _check("layer_norm", x, weight, bias)
    eps = checks.eps("layer_norm", eps)
    row = dispatch.pick("layer_norm", BACKENDS, backend, x)
    if row is None:
        return reference.layer_norm(x, weight, bias, eps)
    return _norm(row, x, weight, bias, eps, True)[0]


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, backend: str | None = None
) -> Tensor:
    """RMS norm over the last dimension: y = x / sqrt(mean(x ** 2) + eps) * weight.

    The rest is as in layer_norm; eps None is that of float32, or of float64 with such an x, as in torch.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    x, weight, _ = _check("rms_norm", x, weight, None)
    eps = checks.rms_eps("rms_norm", x, eps)
    row = dispatch.pick("rms_norm", BACKENDS, backend, x)
    if row is None:
        return reference.rms_norm(x, weight, eps)
    return _norm(row, x, weight, None, eps, False)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and layer norm in one pass over memory: sum = x + residual, y = layer_norm(sum).

    Args:
        x, residual: (..., C), of one shape; of two dtypes, the sum takes the one torch promotes them to.
        weight, bias, eps, backend: as in layer_norm.

    Returns:
        (y, sum): both (..., C). The sum is rounded to its dtype before the statistics are taken.
    """
    x, residual, weight, bias = _check_sum("add_layer_norm", x, residual, weight, bias)
    eps = checks.eps("add_layer_norm", eps)
    row = dispatch.pick("add_layer_norm", BACKENDS, backend, x)
    if row is None:
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _add_norm(row, x, residual, weight, bias, eps, True)[:2]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMS norm: as add_layer_norm, with y = rms_norm(sum) and eps as in rms_norm."""
    x, residual, weight, _ = _check_sum("add_rms_norm", x, residual, weight, None)
    eps = checks.rms_eps("add_rms_norm", x, eps)
    row = dispatch.pick("add_rms_norm", BACKENDS, backend, x)
    if row is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    return _add_norm(row, x, residual, weight, None, eps, False)[:2]


def _check_sum(op, x, residual, weight, bias):
    x, weight, bias = _check(op, x, weight, bias)
    total, residual = checks.residual(op, residual, x)
    if total.dtype != x.dtype:
        weight, bias = (t if t is None else t.to(total.dtype) for t in (weight, bias))
    return total, residual, weight, bias


def _check(op, x, weight, bias):
    """Checks all but a residual; gives these tensors as the kernels take them."""
    checks.floating(op, "x", x)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        # As torch's own norms do on a GPU; on a CPU they compute in x's dtype.
        x, weight, bias = (t.float() if isinstance(t, Tensor) else t for t in (x, weight, bias))
    cols, device, dtypes = x.shape[-1], x.device, (x.dtype, torch.float32)
    if weight is not None:
        checks.parameter(op, "weight", weight, cols, device, dtypes)
        dtypes = (weight.dtype,)  # the kernels read both as one type
    if bias is not None:
        checks.parameter(op, "bias", bias, cols, device, dtypes)
    return x, weight, bias
