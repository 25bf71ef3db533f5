"""Cross entropy of logits with classes or with probabilities."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import Operator
from lspm_kernels.reference import cross_entropy as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as csrc/cross_entropy.h numbers them


def _differentiates(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_CONSTANTS = Limit(
    "target and weight without a gradient",
    lambda logits, target, weight: not _differentiates(target, weight),
    lambda logits, target, weight: "requires_grad=True",
)
# On a GPU cuda comes first: on an H200 the two are alike for rows of even length. For odd ones cuda took
# three times as long, which was mended and not measured since.
BACKENDS = tuple(
    Backend(
        name,
        device,
        _FLOATS,
        kernel("cross_entropy_forward"),
        kernel("cross_entropy_backward"),
        missing,
        (_CONSTANTS,),
    )
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _forward(row, logits, target, weight, *options, saves=True):
    rows, reduction = logits.shape[0], options[1]
    loss = logits.new_empty(() if reduction else (rows,))
    statistics, row_losses = None, None
    gpu = row is not None and row.name != "cpu"  # whose kernels add up the rows' losses in a second step
    if saves or gpu:
        statistics = logits.new_empty(3 * rows + 1, dtype=torch.float32)
    if gpu:
        row_losses = logits.new_empty(2, rows, dtype=torch.float32)
    if row is not None:
        row.forward(logits.contiguous(), target.contiguous(), weight, loss, statistics, row_losses, *options)
    return loss, statistics


def _backward(row, dloss, logits, target, weight, statistics, *options, saves=True):
    dlogits = logits.new_empty(logits.shape)
    if row is not None:
        given = dloss.contiguous(), logits.contiguous(), target.contiguous(), weight, statistics
        row.backward(*given, dlogits, *options)
    return dlogits


_loss_backward = Operator(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor statistics,"
    " int ignore_index, int reduction, float label_smoothing) -> Tensor",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.reduction, ctx.smoothing = inputs
    statistics = output[1]
    ctx.save_for_backward(*tensors, statistics)
    ctx.mark_non_differentiable(statistics)


def _gradient(ctx, dloss, _):
    options = ctx.ignore_index, ctx.reduction, ctx.smoothing
    return _loss_backward(ctx.row, dloss, *ctx.saved_tensors, *options), *[None] * 5


_loss = Operator(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, int reduction,"
    " float label_smoothing) -> (Tensor loss, Tensor statistics)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The cross entropy of softmax(logits) with targets: torch.nn.functional.cross_entropy.

    loss = -sum over c of q_c log softmax(logits)_c, where q is the target's distribution: 1 at its class, or
    its probabilities; smoothed, q = (1 - label_smoothing) q + label_smoothing / C; then weighted by class.

    The forward reads logits once, and keeps two numbers of a row; the backward reads them once more.

    Args:
        logits: (N, C), (C,) or (N, C, d1, ...), float32, bfloat16 or float16; sums are in float32. Where C is
            not the last dimension, channels_last memory is read where it lies, any other is copied.
        target: classes, int64 or int32 of logits' shape without C; or probabilities, of logits' shape and
            dtype. A class other than 0 to C - 1 and ignore_index is an error on a CPU; on a GPU, for which
            nothing waits, it makes the loss NaN.
        weight: (C,), logits' dtype or float32, or None.
        ignore_index: the class of rows that have neither loss nor gradient; a row of logits that is ignored
            is not read. Below 0 beside probabilities, which ignore nothing.
        reduction: "none", "mean" or "sum". "mean" divides by the weights of the targets' classes, and of
            probabilities by their rows: NaN where all rows are ignored.
        label_smoothing: from 0 to 1.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call. A target
            or weight with a gradient is left to the reference.

    Returns:
        loss: logits' dtype, one number, or of logits' shape without C with reduction "none".

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7;
    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    logits, target, weight = _check(logits, target, weight, ignore_index, reduction, label_smoothing)
    row = dispatch.pick("cross_entropy", BACKENDS, backend, logits, target, weight)
    if row is None:
        if not target.is_floating_point():
            checks.classes("cross_entropy", target, _classes(logits), ignore_index)
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        return reference.cross_entropy(logits, target, weight, ignore_index=ignore_index, **options)
    probabilities = target.is_floating_point()
    rows = _rows(logits)
    targets = _rows(target) if probabilities else target.reshape(-1).to(torch.int64)
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
    options = int(ignore_index), _REDUCTIONS[reduction], float(label_smoothing)
    loss = _loss(row, rows, targets, weight, *options)[0]
    if reduction != "none":
        return loss
    return loss.reshape(_without_classes(logits))


def _rows(t):
    """(rows, C), contiguous: the memory of t itself wherever it can be."""
    if t.dim() > 2:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1]).contiguous()


def _classes(logits):
    return logits.shape[1 if logits.dim() > 1 else 0]


def _without_classes(logits):
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[1:]


def _check(logits, target, weight, ignore_index, reduction, label_smoothing):
    """Checks all but which classes the target holds; gives the tensors as the kernels take them."""
    op = "cross_entropy"
    floating = isinstance(logits, Tensor) and logits.dim() > 0 and logits.is_floating_point()
    classes = _classes(logits) if floating else 0
    if classes == 0:
        rule = "a floating-point tensor (N, C), (C,) or (N, C, ...) of one class or more"
        raise ValueError(f"{op}: logits must be {rule}, got {checks.kind(logits)}")
    shapes = _without_classes(logits), logits.shape
    if not isinstance(target, Tensor) or target.shape not in shapes:
        rule = f"classes of shape {tuple(shapes[0])} or probabilities of shape {tuple(shapes[1])}"
        raise ValueError(f"{op}: target must be {rule}, got {checks.shape(target)}")
    probabilities = target.shape == logits.shape
    if target.dtype not in ((logits.dtype,) if probabilities else _INTEGERS):
        rule = f"logits' dtype {logits.dtype}" if probabilities else "dtype torch.int64 or torch.int32"
        raise ValueError(f"{op}: target must have {rule}, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"{op}: target must be on logits' device {logits.device}, got {target.device}")
    if weight is not None:
        dtypes = (logits.dtype, torch.float32)
        checks.parameter(op, "weight", weight, classes, logits.device, dtypes)
    checks.integer(op, "ignore_index", ignore_index)
    if probabilities and ignore_index >= 0:
        raise ValueError(f"{op}: ignore_index must be below 0 beside probabilities, got {ignore_index}")
    checks.one_of(op, "reduction", reduction, _REDUCTIONS)
    checks.probability(op, "label_smoothing", label_smoothing)
    if torch.is_autocast_enabled(logits.device.type) and logits.dtype in _FLOATS:  # as torch's own
        logits = logits.float()
        target = target.float() if probabilities else target
    return logits, target, weight
