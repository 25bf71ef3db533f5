"""Batch norm, a residual addition and an activation in one pass, over the batch of one process or of many."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lspm_kernels import batch_norm, checks, compiled, dispatch, recomputation, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import batch_norm_act as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
_RELU = ACTIVATIONS.index("relu")


# On a GPU cuda comes first: on an H200 both move the bytes at a copy's rate, and Triton's launches cost more.
def _table(forward, backward):
    return tuple(
        Backend(name, device, _FLOATS, kernel(forward), kernel(backward), missing)
        for name, device, kernel, missing in (
            ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
            ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
            ("triton", "cuda", triton.kernel, triton.missing),
        )
    )


BACKENDS = _table("batch_norm_act_forward", "batch_norm_act_backward")
_REDUCTIONS = {row.name: row for row in _table("batch_norm_act_statistics", "batch_norm_act_sums")}


def _rows(t):
    """(N, C, ...) as contiguous (N, ..., C): a view where it lies so."""
    return None if t is None else t.movedim(1, -1).contiguous()


def _vectors(*vectors):
    return (None if t is None else t.contiguous() for t in vectors)


def _statistics(row, x, saves=True):
    x = _rows(x)
    new = x.new_zeros if row is None or not x.numel() else x.new_empty
    found = new(2, x.shape[-1], dtype=torch.float32)
    if row is not None and x.numel():
        partial = found.new_empty(batch_norm.partials(x, row), 3, x.shape[-1])
        _REDUCTIONS[row.name].forward(x, partial, found[0], found[1])
    return found


def _forward(
    row, x, residual, weight, bias, mean, variance, share, eps, activation, training, group, saves=True
):
    x = batch_norm.channels_last(x)
    y = torch.empty_like(x)  # as x lies, and no view: those may not be changed in place
    if row is not None and x.numel():
        known = _vectors(weight, bias, mean, variance)
        row.forward(_rows(x), _rows(residual), *known, _rows(y), eps, activation, not training)
    return y


def _sums(row, dy, x, beside, weight, bias, mean, variance, eps, activation, wants_dresidual, saves=True):
    dy = _rows(dy)
    dresidual = torch.empty_like(dy) if wants_dresidual else dy.new_empty(0)
    new = dy.new_zeros if row is None or not dy.numel() else dy.new_empty
    sums = new(2, dy.shape[-1], dtype=torch.float32)
    if row is not None and dy.numel():
        partial = sums.new_empty(batch_norm.partials(dy, row), 2, dy.shape[-1])
        _REDUCTIONS[row.name].backward(
            dy, _rows(x), _rows(beside), *_vectors(weight, bias, mean, variance),
            dresidual if wants_dresidual else None, partial, sums, eps, activation,
        )  # fmt: skip
    return sums, dresidual.movedim(-1, 1) if wants_dresidual else dresidual


def _backward(row, dy, x, beside, weight, bias, mean, variance, sums, eps, activation, saves=True):
    dy = _rows(dy)
    dx = torch.empty_like(dy)
    if row is not None and dy.numel():
        known = _vectors(weight, bias, mean, variance)
        row.backward(dy, _rows(x), _rows(beside), *known, sums, dx, eps, activation)
    return dx.movedim(-1, 1)


_norm_statistics = Operator("batch_norm_act_statistics(Tensor x) -> Tensor", BACKENDS, _statistics)
_norm_sums = Operator(
    "batch_norm_act_sums(Tensor dy, Tensor x, Tensor? beside, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor variance, float eps, int activation, bool wants_dresidual) -> (Tensor sums, Tensor dresidual)",
    BACKENDS,
    _sums,
)
_norm_backward = Operator(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? beside, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor variance, Tensor? sums, float eps, int activation) -> Tensor",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    x, residual, weight, bias, mean, variance, share, *ctx.options = inputs
    relu_of_sum = residual is not None and ctx.options[1] == _RELU
    # A residual that is kept as another norm's output costs nothing to keep, and gives y again.
    kept = relu_of_sum and recomputation.admits(residual) and getattr(residual.grad_fn, "keeps_output", False)
    # ReLU's slope shows in y, which the next layer keeps anyway. That of ReLU6 does not: y rounds up to 6.
    ctx.keeps_output = relu_of_sum and not kept
    beside = output if ctx.keeps_output else residual if ctx.options[1] else None
    ctx.save_for_backward(x, beside, weight, bias, mean, variance, share)
    ctx.remake = partial(_remake, ctx.row, *ctx.options) if kept or residual is None else None
    ctx.takes_remade, ctx.remade = kept, None


def _remake(row, eps, activation, training, group, x, residual, *known):
    """The output of a call, of what it saved."""
    return _forward(row, x, residual, *known, eps, activation, training, group)


def _gradient(ctx, dy):
    x, beside, weight, bias, mean, variance, share = ctx.saved_tensors
    eps, activation, training, group = ctx.options
    if ctx.takes_remade:
        beside, ctx.remade = recomputation.remake(ctx, *ctx.saved_tensors), None
    wants_dx, wants_dresidual, wants_dweight, wants_dbias = ctx.needs_input_grad[:4]
    known = weight, bias, mean, variance
    dx = dweight = dbias = sums = None
    dresidual = dy if wants_dresidual else None  # of the norm's own output: before the activation
    if wants_dweight or wants_dbias or (wants_dx and training) or (wants_dresidual and activation):
        sums, gradient = _norm_sums(
            ctx.row, dy, x, beside, *known, eps, activation, wants_dresidual and activation != 0
        )
        dbias, dweight = sums[0], sums[1]
        if wants_dresidual and activation:  # a pass over it reads less than one over dy and y
            dy, dresidual, beside, activation = gradient, gradient, None, 0
    if wants_dx:
        if not training:
            sums = None
        elif group:
            sums = batch_norm.collectives().all_reduce(sums, "sum", group) * share
        dx = _norm_backward(ctx.row, dy, x, beside, *known, sums, eps, activation)
    return (
        dx,
        dresidual,
        dweight if wants_dweight else None,
        dbias if wants_dbias else None,
        *[None] * 7,
    )


_norm = Operator(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance,"
    " Tensor? share, float eps, int activation, bool training, str group) -> Tensor",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch norm, residual addition and activation:
    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual).

    In training, and where there are no running statistics, mean and variance are those of each channel over
    the batch, taken in float32; else they are the running ones, which are then constants to the gradient.
    Memory is read and written channels last: another x or residual is copied first.

    Args:
        x: (N, C, ...), float32, bfloat16 or float16.
        weight, bias: (C,), x's dtype or float32, or None.
        running_mean, running_var: (C,), x's dtype or float32, or both None. Training updates them in place:
            running += momentum * (batch - running), with the unbiased variance.
        residual: of x's shape, or None; of two dtypes, y takes the one torch promotes them to.
        activation: None, "relu", "relu6", "silu" or "gelu" (by erf).
        momentum: 0 to 1. For a cumulative average the caller, who counts the batches, gives 1 / count.
        eps: added to the variance.
        process_group: in training, statistics are those of the batches of all its ranks together; the
            gradients of weight and bias are this rank's share, as in torch.nn.SyncBatchNorm.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (N, C, ...), x's dtype, channels last in memory.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; statistics are to be taken of fewer than
            two values; running statistics that are used on a CPU are not finite.
        NotImplementedError: the backend asked for does not take this call.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithms 1 and 2.
    """
    x, residual = batch_norm.arguments(
        "batch_norm_act", x, weight, bias, running_mean, running_var, residual, activation, momentum, eps
    )
    of_batch = bool(training) or running_mean is None
    group = batch_norm.group_name("batch_norm_act", process_group) if of_batch else ""
    count = x.numel() // max(x.shape[1], 1)
    if of_batch and count < 2 and not group:
        rule = "have more than one value per channel to take statistics of"
        raise ValueError(f"batch_norm_act: x must {rule}, got {tuple(x.shape)}")
    row = dispatch.pick("batch_norm_act", BACKENDS, backend, x)
    if row is None:
        if group:
            raise NotImplementedError("batch_norm_act: reference needs process_group None, got a group")
        if not of_batch and checks.readable(running_mean) and running_mean.is_cpu:
            batch_norm.running_statistics("batch_norm_act", running_mean, running_var)
        return reference.batch_norm_act(
            x, weight, bias, running_mean, running_var, residual=residual, activation=activation,
            training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    found = None
    if of_batch:
        with torch.no_grad():
            found = _norm_statistics(row, batch_norm.channels_last(x))
    running = running_mean, running_var
    return normalise(row, x, residual, weight, bias, running, found, momentum, eps, activation, group)


def normalise(row, x, residual, weight, bias, running, found, momentum, eps, activation, group):
    """The op, its arguments checked; found: mean and variance of x, None where the running ones serve."""
    x, residual, share = batch_norm.channels_last(x), batch_norm.channels_last(residual), None
    if found is None:
        mean, variance = (t.float() for t in running)
    else:
        with torch.no_grad():
            mean, variance = found[0], found[1]
            count = x.numel() // max(x.shape[1], 1)
            if group:
                mean, variance, count, share = batch_norm.of_all_ranks(mean, variance, count, group)
            if running[0] is not None:
                reference.update(*running, mean, variance, count, momentum)
    weight, bias = (t if t is None else t.float() for t in (weight, bias))
    code = ACTIVATIONS.index(activation)
    of_batch = found is not None
    return _norm(row, x, residual, weight, bias, mean, variance, share, float(eps), code, of_batch, group)
