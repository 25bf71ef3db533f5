"""The cross entropy of a linear layer's outputs with classes, without the matrix of logits."""

import functools

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, linear_cross_entropy_checks, triton
from lspm_kernels import linear_cross_entropy_blocks as blocks
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import linear_cross_entropy as reference

_OP = "linear_cross_entropy"
_F32 = torch.float32
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NONE, _MEAN = 0, 1
_REDUCTIONS = {"none": _NONE, "mean": _MEAN, "sum": 2}

# No CUDA C++: the products are cuBLAS', and what stands between them reads and writes memory once, which
# Triton does at the same speed.
_KERNELS = f"{_OP}_forward", f"{_OP}_backward"
BACKENDS = tuple(
    Backend(name, device, _FLOATS, *map(kernel, _KERNELS), missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _forward(row, hidden, weight, bias, target, class_weight, ignore_index, reduction, *others, saves=True):
    *options, now = others
    rows = len(hidden)
    if row is None:
        loss = hidden.new_empty(rows if reduction == _NONE else (), dtype=_F32)
        statistics = loss.new_empty(3 * rows + 1)
        return loss, loss.new_empty(rows), statistics, *_empty((hidden, weight, bias), now)
    options = ignore_index, *options
    counts = target != ignore_index
    share = counts.to(_F32)
    if class_weight is not None:
        share *= class_weight[target.clamp(0, len(weight) - 1)]
    divisor = blocks.total(share) if reduction == _MEAN else share.new_ones(())
    places = blocks.places(row, target, counts, len(weight), ignore_index)
    known = blocks.taken(target, places), class_weight
    if any(now):
        dloss = (1 / divisor).expand(len(known[0])).contiguous()
        one_pass = blocks.by_rows if hidden.dtype == _F32 else blocks.by_classes
        losses, *made = one_pass(row, hidden, places, weight, bias, *known, dloss, now, options)
        statistics = share.new_zeros(3, rows)
    else:
        losses, statistics = blocks.losses(row, blocks.taken(hidden, places), weight, bias, *known, options)
        statistics, made = blocks.put(statistics, places, rows), _empty((hidden, weight, bias), now)
    losses = blocks.put(losses, places, rows)
    loss = losses if reduction == _NONE else blocks.total(losses) / divisor
    lse = statistics[0] + statistics[1]
    return loss, lse, torch.cat([statistics.flatten(), divisor.view(1)]), *made


def _empty(tensors, wanted):
    """Memory like that of tensors, of what is not wanted: (0,)."""
    pairs = zip(tensors, wanted, strict=True)
    return tuple((tensors[0] if t is None else t).new_empty(t.shape if w else 0) for t, w in pairs)


def _recompute(row, dloss, dlse, hidden, weight, bias, target, class_weight, statistics, *others, saves=True):
    ignore_index, _, *options, wanted = others
    if row is None:
        return _empty((hidden, weight, bias), wanted)
    rows, counts = len(hidden), target != ignore_index
    places = blocks.places(row, target, counts, len(weight), ignore_index)
    dloss = statistics.new_zeros(()) if dloss is None else dloss / statistics[-1]
    taken = functools.partial(blocks.taken, places=places)
    dloss = taken(dloss.expand(rows)).contiguous()
    dlse = None if dlse is None else taken(dlse).contiguous()
    kept = statistics[:-1].view(3, rows)
    kept = kept if places is None else kept.index_select(1, places)
    given = taken(hidden), weight, bias, taken(target), class_weight, kept, wanted
    made = blocks.gradients(row, dloss, dlse, *given, (ignore_index, *options))
    return blocks.like_inputs(made, hidden, places, bias, wanted)


_backward = Operator(
    f"{_OP}_backward(Tensor? dloss, Tensor? dlse, Tensor hidden, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor? class_weight, Tensor statistics, int ignore_index, int reduction, float label_smoothing,"
    " float z_loss, float softcap, bool[] wanted) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    BACKENDS,
    _recompute,
)


def _scale(row, dloss, hidden, weight, bias, *made, saves=True):
    # Where they are not kept for another backward, gradients are scaled where they lie, or given as they are.
    if saves or torch._C._autograd._get_current_graph_task_keep_graph():
        return tuple(gradient * dloss for gradient in made)
    if row.name == "cpu" and dloss == 1:
        return made
    return tuple(gradient.mul_(dloss) for gradient in made)


# hidden, weight and bias are there for who differentiates what it gives: that depends on them, and raises.
_scaled = Operator(
    f"{_OP}_scaled(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor made_dhidden,"
    " Tensor made_dweight, Tensor made_dbias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    BACKENDS,
    _scale,
)


def _save(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.reduction, ctx.smoothing, ctx.z_loss, ctx.softcap, now = inputs
    _, lse, statistics, *made = output
    ctx.made = any(now)
    ctx.save_for_backward(*tensors, statistics, *(made if ctx.made else ()))
    ctx.mark_non_differentiable(statistics, *made, *([lse] if ctx.made else []))


def _gradient(ctx, dloss, dlse, *_):
    hidden, weight, bias, target, class_weight, statistics, *made = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    if ctx.made and dloss is not None:
        found = _scaled(ctx.row, dloss, hidden, weight, bias, *made)
    elif dloss is not None or dlse is not None:
        options = ctx.ignore_index, ctx.reduction, ctx.smoothing, ctx.z_loss, ctx.softcap, wanted
        given = hidden, weight, bias, target, class_weight, statistics
        found = _backward(ctx.row, dloss, dlse, *given, *options)
    else:
        found = None, None, None
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *[None] * 8


_loss = Operator(
    f"{_OP}(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
    " int ignore_index, int reduction, float label_smoothing, float z_loss, float softcap, bool[] now) ->"
    " (Tensor loss, Tensor lse, Tensor statistics, Tensor made_dhidden, Tensor made_dweight,"
    " Tensor made_dbias)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The cross entropy of logits = hidden @ weight.T + bias with classes, without a matrix of all logits.

    logits = softcap * tanh(logits / softcap), where there is a softcap
    loss = cross_entropy(logits, target, class_weight) + z_loss * class_weight[target] * lse ** 2
    lse = log(sum over c of exp(logits)_c)

    That of torch.nn.functional.linear_cross_entropy, for classes. Logits are there a block at a time, at most
    1/8 of them (but all up to 13 MiB, and 16 rows); half types take hidden's gradient in float32 besides.

    Where all is float32 and the loss is one number, its gradients are made in the forward, by three products
    in all, and the backward scales them, unless the gradient of the loss is 1. So are they on a CPU beside
    hidden in bfloat16, up to 25 MiB of logits, which are then all there. Else, and from 13 MiB of logits in
    float32 on for fewer than 576 rows, the backward makes them again, which is a fourth product. Without a
    gradient there is one. What our kernels add up has the same bits for any number of threads; torch's
    products may differ.

    Args:
        hidden: (..., D), float32, bfloat16 or float16; under autocast it is taken in autocast's dtype. Logits
            have its dtype, and all other sums are in float32.
        weight: (V, D), hidden's dtype or float32.
        target: (...), int64 or int32. A class other than 0 to V - 1 and ignore_index is an error on a CPU; on
            a GPU, for which nothing waits, it makes the loss NaN.
        bias: (V,), hidden's dtype or float32, or None.
        class_weight: (V,), hidden's dtype or float32, or None. It has no gradient, as torch's has none.
        ignore_index: the class of rows that have neither loss nor gradient. On a CPU no product reads them.
        label_smoothing: from 0 to 1; weighted by class as torch's is.
        z_loss: of lse ** 2, 0 or more. It is weighted as the row is, so that "mean" is one weighted mean.
            Liger's is not, and is divided by the number of rows; without a class_weight they agree.
        softcap: above 0, or None.
        reduction: "none", "mean" or "sum". "mean" divides by the weights of the targets' classes: NaN where
            all rows are ignored.
        return_lse: gives lse too; it has a gradient.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        loss: float32, where torch's has hidden's dtype; one number, or with "none" of target's shape.
        lse: with return_lse, float32 of target's shape; 0 of rows that are ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024); Wijmans et al., "Cut
    Your Losses in Large-Vocabulary Language Models" (2024); Chowdhery et al., "PaLM" (2022), for z_loss.
    """
    hidden, weight, bias = linear_cross_entropy_checks.check(
        hidden, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
        _REDUCTIONS,
    )  # fmt: skip
    row = dispatch.pick(_OP, BACKENDS, backend, hidden)
    if row is None:
        checks.classes(_OP, target, len(weight), ignore_index)
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
        given = hidden, weight, target, bias, class_weight
        loss, lse = reference.linear_cross_entropy(
            *given, ignore_index=ignore_index, reduction=reduction, **options
        )
        return (loss, lse) if return_lse else loss
    classes = target.reshape(-1).to(torch.int64).contiguous()
    rows = hidden.reshape(len(classes), hidden.shape[-1])
    if class_weight is not None:
        class_weight = class_weight.to(_F32).contiguous()
    once = reduction != "none" and not return_lse and _at_once(hidden, weight, bias)
    once = once and blocks.in_one_pass(len(rows), len(weight), hidden.dtype)
    now = [once and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    options = float(label_smoothing), float(z_loss), float(softcap or 0), now
    given = rows, weight, bias, classes, class_weight, int(ignore_index), _REDUCTIONS[reduction]
    loss, lse, *_ = _loss(row, *given, *options)
    loss = loss if reduction != "none" else loss.reshape(target.shape)
    return (loss, lse.reshape(target.shape)) if return_lse else loss


def _at_once(hidden, *others):
    """Whether gradients may be made in the forward: not in torch.func's, where no tensor says it wants one.

    Not in float16, which they would leave before a loss scale is known, nor of halves on a GPU: not timed.
    """
    if not torch.is_grad_enabled():
        return False
    dtypes = {t.dtype for t in (hidden, *others) if t is not None}
    if dtypes != {_F32} and not (hidden.is_cpu and dtypes <= {torch.bfloat16, _F32}):
        return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
