"""Cross entropies of rows of logits, and the logarithms of their sums, in float32 whatever the logits are.

What other libraries' losses are made of: softcap, z-loss and a gradient in the memory of the logits are
theirs and not torch's. The kernels are those of linear_cross_entropy, of which all logits are one block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import checks, dispatch
from lspm_kernels.operator import Operator
from lspm_kernels.ops.linear_cross_entropy import BACKENDS

_F32 = torch.float32


def _forward(row, logits, target, weight, ignore_index, smoothing, softcap, in_place, saves=True):
    rows, classes = logits.shape
    kept, losses = (logits.new_empty(*size, dtype=_F32) for size in ((5, rows), (rows,)))
    if row is not None and rows:
        given = logits.contiguous(), target, weight, kept, losses
        row.forward(*given, 0, classes, ignore_index, smoothing, 0.0, softcap)
    return losses, kept[0] + kept[1], kept[:3].clone()


def _backward(row, dlosses, dlse, logits, target, weight, statistics, *options, saves=True):
    *options, in_place = options
    logits = logits.contiguous()
    # An operator's outputs are new tensors; where nothing traces, the logits may become their own gradient.
    gradient = logits if in_place and not saves else logits.clone()
    if row is not None and len(logits):
        dlosses = statistics.new_zeros(len(logits)) if dlosses is None else dlosses.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        ignore_index, smoothing, softcap = options
        given = dlosses, dlse, gradient, target, weight, statistics, None
        row.backward(*given, 0, logits.shape[1], ignore_index, smoothing, 0.0, softcap)
    if gradient is logits:
        torch.autograd.graph.increment_version(logits)  # so that a second backward fails loudly
    return gradient


_losses_backward = Operator(
    "logit_losses_backward(Tensor? dlosses, Tensor? dlse, Tensor logits, Tensor target, Tensor? weight,"
    " Tensor statistics, int ignore_index, float smoothing, float softcap, bool in_place) -> Tensor",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.smoothing, ctx.softcap, ctx.in_place = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx, dlosses, dlse, _):
    options = ctx.ignore_index, ctx.smoothing, ctx.softcap, ctx.in_place
    return _losses_backward(ctx.row, dlosses, dlse, *ctx.saved_tensors, *options), *[None] * 6


_losses = Operator(
    "logit_losses(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float smoothing,"
    " float softcap, bool in_place) -> (Tensor losses, Tensor lse, Tensor statistics)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def logit_losses(
    op: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """(losses, lse) of rows, both (N,) in float32 with gradients, and 0 where the class is ignore_index.

    Args:
        op: what an error calls itself.
        logits: (N, C), float32, bfloat16 or float16.
        target: (N,), int64 or int32.
        weight: (C,), of classes, or None.
        softcap: the logits are softcap * tanh(logits / softcap), or as they are where it is None.
        in_place: the backward writes the gradient into logits' memory, in eager mode.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"{op}: logits must be a floating-point tensor (N, C), got {checks.kind(logits)}")
    if not isinstance(target, Tensor) or target.shape != logits.shape[:1] or target.dtype.is_floating_point:
        rule = f"classes of shape ({len(logits)},)"
        raise ValueError(f"{op}: target must be {rule}, got {checks.kind(target)}")
    checks.probability(op, "label_smoothing", label_smoothing)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0 or None, got {softcap!r}")
    if weight is not None:
        checks.vector(op, "weight", weight, logits.shape[1], (logits.dtype, _F32))
    checks.beside(op, "logits", logits.device, target=target, weight=weight)
    checks.classes(op, target, logits.shape[1], ignore_index)
    row = dispatch.pick(op, BACKENDS, None, logits)
    counts = target != ignore_index
    if row is None:
        losses, lse = _reference(logits, target, weight, ignore_index, label_smoothing, softcap)
    else:
        given = target.to(torch.int64).contiguous(), None if weight is None else weight.to(_F32).contiguous()
        options = int(ignore_index), float(label_smoothing), float(softcap or 0), bool(in_place)
        losses, lse, _ = _losses(row, logits, *given, *options)
    return losses, lse.where(counts, 0.0)


def _reference(logits, target, weight, ignore_index, label_smoothing, softcap):
    wide = logits.to(torch.promote_types(logits.dtype, _F32))
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    weight = None if weight is None else weight.to(wide.dtype)
    options = {"ignore_index": ignore_index, "reduction": "none", "label_smoothing": label_smoothing}
    return F.cross_entropy(wide, target.long(), weight, **options), wide.logsumexp(-1)


def reduced(values: Tensor, divisor: Tensor, reduction: str) -> Tensor:
    """values (N,), or their sum, or that divided."""
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / divisor
