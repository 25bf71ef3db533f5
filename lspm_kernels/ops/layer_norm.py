"""Layer norm and RMS norm over the last dimension, alone or behind a residual addition."""

import torch
from torch import Tensor

from lspm_kernels import compiled, dispatch
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import layer_norm as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RUNS = 256  # partial sums of the weights' gradients, at most; csrc/layer_norm.h says what they are for
_ROWS_A_RUN = 16  # at least, so that a run's own sum is cheap beside its rows


def _cpu_forward(*args):
    compiled.cpu.layer_norm_forward(*args, torch.get_num_threads())


def _cpu_backward(*args):
    compiled.cpu.layer_norm_backward(*args, torch.get_num_threads())


def _cuda_forward(*args):
    compiled.cuda.layer_norm_forward(*args, 0)


def _cuda_backward(*args):
    compiled.cuda.layer_norm_backward(*args, 0)


def _triton_forward(x, residual, weight, bias, total, y, statistics, eps, centered):
    from lspm_kernels.triton import layer_norm

    *mean, rstd = (*statistics,)
    layer_norm.forward(x, residual, weight, bias, total, y, *(mean or [None]), rstd, eps, centered)


def _triton_backward(dy, dsum, total, statistics, *args):
    from lspm_kernels.triton import layer_norm

    *mean, rstd = (*statistics,)
    layer_norm.backward(dy, dsum, total, *(mean or [None]), rstd, *args)


# On a GPU both move the same bytes; cuda comes first because its launch costs less. Predicted, not measured.
BACKENDS = (
    Backend("cpu", "cpu", _FLOATS, _cpu_forward, _cpu_backward, compiled.nothing_missing),
    Backend("cuda", "cuda", _FLOATS, _cuda_forward, _cuda_backward, compiled.cuda_missing),
    Backend("triton", "cuda", _FLOATS, _triton_forward, _triton_backward, compiled.triton_missing),
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
    dweight = weight.new_empty(weight.shape) if wants_dweight else None  # contiguous, whatever weight is
    dbias = None if bias is None else bias.new_empty(bias.shape)
    if row is not None and dy.numel():
        dsum, weight = _contiguous(dsum), _contiguous(weight)
        runs = min(_RUNS, -(-_rows(dy) // _ROWS_A_RUN))
        partial = statistics.new_empty(runs, 2, dy.shape[-1])
        row.backward(dy, dsum, total, statistics, weight, dx, dweight, dbias, partial, centered)
    elif row is not None:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    # An operator's outputs are tensors: an empty one stands for what is not wanted.
    return dx, dy.new_empty(0) if dweight is None else dweight, dy.new_empty(0) if dbias is None else dbias


def _contiguous(t):
    return None if t is None else t.contiguous()


def _rows(x):
    return x.numel() // max(x.shape[-1], 1)


_norm_backward = Operator(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor statistics, Tensor? weight, Tensor? bias,"
    " bool wants_dweight, bool centered) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    BACKENDS,
    _backward,
)


def _add_save(ctx, inputs, output):
    _, _, weight, bias, _, ctx.centered = inputs
    _, total, statistics = output
    ctx.save_for_backward(total, statistics, weight, bias)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)  # an output that was not used has None for its gradient


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
    bias = bias if wants_dbias else None
    dx, dweight, dbias = _norm_backward(
        ctx.row, dy, dsum, total, statistics, weight, bias, wants_dweight, ctx.centered
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
        x: (..., C), float32, bfloat16 or float16; statistics are taken in float32.
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
    x = _check("layer_norm", x, weight, bias)
    row = dispatch.pick("layer_norm", BACKENDS, backend, x)
    if row is None:
        return reference.layer_norm(x, weight, bias, eps)
    return _norm(row, x, weight, bias, eps, True)[0]


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, backend: str | None = None
) -> Tensor:
    """RMS norm over the last dimension: y = x / sqrt(mean(x ** 2) + eps) * weight.

    Args, returns and raises as layer_norm; eps None is torch.finfo(x.dtype).eps, as in torch.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    x = _check("rms_norm", x, weight, None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
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

    Raises: as layer_norm.
    """
    x, residual = _check_sum("add_layer_norm", x, residual, weight, bias)
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
    """Residual addition and RMS norm in one pass over memory: sum = x + residual, y = rms_norm(sum).

    Args, returns and raises as add_layer_norm; eps as in rms_norm.
    """
    x, residual = _check_sum("add_rms_norm", x, residual, weight, None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    row = dispatch.pick("add_rms_norm", BACKENDS, backend, x)
    if row is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    return _add_norm(row, x, residual, weight, None, eps, False)[:2]


def _check_sum(op, x, residual, weight, bias):
    x = _check(op, x, weight, bias)
    if not isinstance(residual, Tensor) or residual.shape != x.shape:
        got = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
        raise ValueError(f"{op}: residual must be a tensor of x's shape {tuple(x.shape)}, got {got}")
    if residual.device != x.device:
        raise ValueError(f"{op}: residual must be on x's device {x.device}, got {residual.device}")
    if residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return x, residual


def _check(op, x, weight, bias):
    """Checks all but a residual; gives x as the kernels take it."""
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.dtype.is_floating_point:
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: x must be a floating-point tensor of one dimension or more, got {got}")
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as torch's own norms do on a GPU; on a CPU they compute in x's dtype
    dtypes = (x.dtype, torch.float32)
    if weight is not None:
        _check_parameter(op, "weight", weight, x, dtypes)
        dtypes = (weight.dtype,)  # the kernels read both as one type
    if bias is not None:
        _check_parameter(op, "bias", bias, x, dtypes)
    return x


def _check_parameter(op, name, t, x, dtypes):
    if not isinstance(t, Tensor) or t.dim() != 1 or t.numel() != x.shape[-1]:
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{op}: {name} must be a tensor of shape ({x.shape[-1]},), got {got}")
    if t.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{op}: {name} must have dtype {rule}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")
