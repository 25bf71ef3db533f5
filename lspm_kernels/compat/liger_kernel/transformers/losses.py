"""Liger's cross entropies, of logits and of a linear layer's outputs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.compat.logit_losses import logit_losses, reduced
from lspm_kernels.compat.refusals import refuse
from lspm_kernels.ops.linear_cross_entropy import linear_cross_entropy

_REDUCTIONS = ("mean", "sum", "none")
_BLOCK = 64 << 20  # bytes of logits that are there at once to find the largest of each row


@dataclass
class CrossEntropyOutput:
    """A loss and what was asked for beside it."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy with softcap and z-loss: cross_entropy(x, target, weight) + lse_square_scale * lse(x)^2.

    Args:
        input: (N, C), float32, bfloat16 or float16; x = softcap * tanh(input / softcap), or input.
        target: (N,), int64 or int32.
        weight: (C,), of classes; it does not weight the z-loss, as Liger's does not.
        size_average, reduce: only None.
        ignore_index: the class of rows that have neither loss nor gradient.
        reduction: "mean", by the weights of targets that count, and 0 where none does; "sum" or "none".
        label_smoothing: from 0 to 1.
        return_z_loss: the part of the loss that is z-loss, too; it has no gradient of its own.
        return_token_accuracy: the share of rows whose largest logit is their class, with "none" of each row.
        return_predicted_tokens: (N,), int64: the largest logit's class, and -1 where the target is ignored.

    Returns:
        The loss in input's dtype, or a CrossEntropyOutput where anything is returned beside it.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: size_average or reduce is given.

    Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024).
    """
    op = "liger_cross_entropy"
    refuse(op, "size_average", size_average, None, "reduction says it")
    refuse(op, "reduce", reduce, None, "reduction says it")
    check_reduction(op, reduction)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "softcap": softcap}
    losses, lse = logit_losses(op, input, target, weight, **options)
    counts = target != ignore_index
    loss = reduced(losses, _divisor(_share(target, weight, counts), counts), reduction)
    z_loss = reduced(lse_square_scale * lse.square(), _divisor(counts.sum(), counts), reduction)
    found = CrossEntropyOutput((loss + z_loss if lse_square_scale else loss).to(input.dtype))
    if return_z_loss:
        found.z_loss = z_loss.detach().to(input.dtype)
    if not (return_token_accuracy or return_predicted_tokens):
        return found if return_z_loss else found.loss
    predicted = input.detach().argmax(-1).where(counts, -1)
    return _with_tokens(found, predicted, target, reduction, return_token_accuracy, return_predicted_tokens)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """liger_cross_entropy of input weight^T + bias, by lspm_kernels.linear_cross_entropy.

    Args:
        input: (N, D), float32, bfloat16 or float16. weight: (V, D). bias: (V,) or None.
        ce_weight: (V,), of classes.
        accum_dtype, chunk_mem_const: taken and not needed: sums are in float32, blocks are sized to caches.
        use_token_scaling: each row's loss, z-loss included, is multiplied by the probability of its class,
            which has no gradient. Beside class weights, smoothing or a z-loss it costs a product more.
        return_token_accuracy, return_predicted_tokens: as of liger_cross_entropy, for a product more.
        target, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss: those of
            liger_cross_entropy.

    Returns:
        The loss, float32, or a CrossEntropyOutput where anything is returned beside it.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: an option is asked for that is not carried.
    """
    op = "liger_fused_linear_cross_entropy"
    if accum_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f"{op}: accum_dtype must be None or torch.float32, got {accum_dtype}")
    check_reduction(op, reduction)
    given = input, weight, target
    options = {"bias": bias, "ignore_index": ignore_index, "softcap": softcap}
    # Only without class weights is Liger's z-loss weighted as ours is.
    apart = bool(lse_square_scale) and ce_weight is not None
    needs_lse = apart or return_z_loss
    loss = linear_cross_entropy(
        *given,
        **options,
        class_weight=ce_weight,
        label_smoothing=label_smoothing,
        z_loss=0.0 if apart else lse_square_scale,
        reduction="none" if use_token_scaling else reduction,
        return_lse=needs_lse,
    )
    loss, lse = loss if needs_lse else (loss, None)
    counts, scale = target != ignore_index, 1.0
    if use_token_scaling:
        is_plain = ce_weight is None and not label_smoothing and not lse_square_scale
        with torch.no_grad():
            scale = (-(loss if is_plain else linear_cross_entropy(*given, **options, reduction="none"))).exp()
        loss = reduced(scale * loss, _divisor(_share(target, ce_weight, counts), counts), reduction)
    elif reduction == "mean":
        loss = loss.where(counts.any(), 0.0)
    found = CrossEntropyOutput(loss)
    if needs_lse:
        z_losses = scale * lse_square_scale * lse.square()
        z_loss = reduced(z_losses, _divisor(counts.sum(), counts), reduction)
        found.loss = loss + z_loss if apart else loss
        found.z_loss = z_loss.detach() if return_z_loss else None
    if not (return_token_accuracy or return_predicted_tokens):
        return found if return_z_loss else found.loss
    predicted = _predicted(input, weight, bias).where(counts, -1)
    return _with_tokens(found, predicted, target, reduction, return_token_accuracy, return_predicted_tokens)


def check_reduction(op: str, reduction: str) -> None:
    """Raises ValueError unless reduction is known."""
    checks.one_of(op, "reduction", reduction, _REDUCTIONS)


def check_options(op: str, label_smoothing: float, reduction: str, softcap: float | None) -> None:
    """Raises ValueError unless a loss can have these."""
    check_reduction(op, reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, got {label_smoothing!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0 or None, got {softcap!r}")


def _divisor(share, counts):
    """share, or 1 where no row counts: of nothing the mean is 0, as Liger divides row by row."""
    return share.where(counts.any(), 1)


def _share(target, weight, counts):
    if weight is None:
        return counts.sum()
    return weight.float()[target.where(counts, 0)].where(counts, 0).sum()


@torch.no_grad()
def _predicted(input, weight, bias):
    """The largest logit's class of each row (N,), from a block of rows at a time."""
    input = input.to(weight.dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    rows = max(_BLOCK // (len(weight) * weight.element_size()), 1)
    return torch.cat([F.linear(block, weight, bias).argmax(-1) for block in input.split(rows)])


def _with_tokens(found, predicted, target, reduction, return_token_accuracy, return_predicted_tokens):
    """What was found, and of the predicted classes, -1 where the target is ignored, what is asked for."""
    if return_predicted_tokens:
        found.predicted_tokens = predicted
    if return_token_accuracy:
        hits = ((predicted == target) & (predicted >= 0)).float()
        found.token_accuracy = hits if reduction == "none" else hits.sum() / (predicted >= 0).sum()
    return found
