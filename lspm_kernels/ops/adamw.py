"""AdamW's step over a list of tensors, in place, and the norm of their gradients, by which it clips them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import InPlaceOperator, Operator
from lspm_kernels.reference import adamw as reference

_INFINITY = float("inf")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_BF16 = Limit(
    "bfloat16 for stochastic rounding",
    lambda param, dense, stochastic: not stochastic or param.dtype == torch.bfloat16,
    lambda param, *rest: dispatch.dtype_name(param.dtype),
)
_DENSE = Limit("tensors without gaps", lambda param, dense, *rest: dense, lambda *args: "one with gaps")


def _table(kernel, limits):
    return (
        Backend("cpu", "cpu", _FLOATS, compiled.cpu_kernel(kernel), None, compiled.nothing_missing, limits),
        # No CUDA C++: a step waits for memory, element by element, and Triton's loads are as wide.
        Backend("triton", "cuda", _FLOATS, triton.kernel(kernel), None, triton.missing, limits),
    )


BACKENDS = _table("adamw_update", (_DENSE, _BF16))
NORM_BACKENDS = _table("adamw_norm", ())


def _update(row, params, grads, *states_and_seed):
    *states, scale, steps, seed, lr, beta1, beta2, eps, weight_decay, maximize = states_and_seed
    pairs = zip(grads, params, strict=True)
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in pairs]
    numbers = (lr, beta1, beta2, eps, weight_decay)
    row.forward(params, grads, *states, scale, steps, numbers, maximize, None if seed is None else int(seed))


def _norm(row, grads, saves=True):
    norm = torch.empty((), dtype=torch.float32, device=grads[0].device)
    if row is not None:
        row.forward(grads, norm)
    return norm


_step = InPlaceOperator(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] master_params, Tensor? scale, SymInt[] steps, Tensor? seed,"
    " float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> ()",
    BACKENDS,
    _update,
)
_grad_norm = Operator("adamw_norm(Tensor[] grads) -> Tensor", NORM_BACKENDS, _norm)


def adamw_(
    params: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    exp_avgs: Tensor | Sequence[Tensor],
    exp_avg_sqs: Tensor | Sequence[Tensor],
    max_exp_avg_sqs: Tensor | Sequence[Tensor] | None = None,
    *,
    step: int | Sequence[int],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    scale: Tensor | None = None,
    master_params: Tensor | Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """One step of AdamW on each of the tensors, in place, in one pass over all of them.

        g = scale * grad, or its negative with maximize
        exp_avg += (1 - beta1) * (g - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g ** 2
        param -= lr * weight_decay * param
                 + lr / (1 - beta1 ** step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2 ** step)) + eps)

    With max_exp_avg_sqs (AMSGrad) these become max(max_exp_avg_sq, exp_avg_sq) and stand under the root in
    place of exp_avg_sq. Everything is computed in float32, but what depends on numbers alone in float64.
    Threads share all elements, whatever tensor they are of; the same bits for any number of threads.

    Args:
        params: tensors of any shapes, or one: of one dtype, float32, bfloat16 or float16, on one device.
        grads: as many, of the same shapes and dtype. They do not change: scale counts where they are read.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: as many, of the same shapes and strides; of params' dtype or
            float32. From 0 on.
        step: of all tensors or of each, from 1 on.
        lr, eps, weight_decay: at least 0 and finite.
        betas: each at least 0 and below 1.
        scale: one float32 on params' device, as of clipping or of a scaled loss; nothing waits for it.
        master_params: float32, of the same shapes and strides, beside bfloat16 or float16 params and float32
            moments: what changes, while params become their rounded copies.
        stochastic_rounding: of bfloat16 params without master_params, so that small steps are not lost: up or
            down, with the exact value as the mean. What an element takes depends on seed, on its place in
            memory and on the place of its tensor alone.
        seed: from 0 to 2 ** 63 - 1, another one for every step; None draws one from torch's generator.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        params.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or records gradients. Nothing has
            changed then.
        NotImplementedError: the backend asked for does not take this call.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2; Reddi, Kale
    and Kumar, "On the Convergence of Adam and Beyond" (2018), algorithm 2.
    """
    given = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
             "max_exp_avg_sqs": () if max_exp_avg_sqs is None else max_exp_avg_sqs,
             "master_params": () if master_params is None else master_params}  # fmt: skip
    lists = [_listed("adamw_", name, tensors) for name, tensors in given.items()]
    if not lists[0]:
        return params
    steps = list(step) if isinstance(step, tuple | list) else [step] * len(lists[0])
    _check(*lists)
    _check_numbers(len(lists[0]), lists[0][0].device, steps, lr, betas, eps, weight_decay, scale)
    if lists[5] and stochastic_rounding:
        raise ValueError("adamw_: stochastic_rounding must be False beside master_params, got True")
    numbers = lr, *betas, eps, weight_decay, bool(maximize)
    update_(lists, scale, steps, numbers, stochastic_rounding, seed, backend)
    return params


def update_(lists, scale, steps, numbers, stochastic_rounding=False, seed=None, backend=None) -> None:
    """adamw_ of arguments that are known to be right: six lists of tensors, the last two empty or not."""
    dense = all(map(_has_no_gaps, lists[0]))
    row = dispatch.pick("adamw_", BACKENDS, backend, lists[0][0], dense, stochastic_rounding)
    if row is not None:
        seed = checks.seed("adamw_", seed) if stochastic_rounding else None
        _step(row, *lists, scale, steps, seed, *numbers)
    elif stochastic_rounding:
        raise NotImplementedError("adamw_: reference needs stochastic_rounding=False, got True")
    else:
        reference.adamw_(*lists, scale if scale is None else scale.view(()), steps, *numbers)


@torch.no_grad()
def adamw_norm(grads: Tensor | Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The 2-norm of all gradients as if they were one vector, in one pass; it has no gradient itself.

    Squares are added up in float64, in parts that depend on the sizes alone: the same bits for any number of
    threads, and no gradient is too large or too small to be squared.

    Args:
        grads: tensors of any shapes, dtypes and devices, or one.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        A float32 of no dimensions on the device of the first of them, for which nothing waits.

    Raises:
        ValueError: an argument is not as said above.
        NotImplementedError: the backend asked for does not take this call.
    """
    grads = _listed("adamw_norm", "grads", grads)
    kinds: dict[tuple, list[Tensor]] = {}
    for i, grad in enumerate(grads):
        if not isinstance(grad, Tensor) or not grad.is_floating_point():
            raise ValueError(
                f"adamw_norm: grads[{i}] must be a floating-point tensor, got {checks.kind(grad)}"
            )
        dense = grad if _has_no_gaps(grad) else grad.contiguous()
        kinds.setdefault((grad.device, grad.dtype), []).append(dense)
    norms = []
    for alike in kinds.values():
        row = dispatch.pick("adamw_norm", NORM_BACKENDS, backend, alike[0])
        norms.append(reference.adamw_norm(alike) if row is None else _grad_norm(row, alike))
    if len(norms) == 1:
        return norms[0]
    return reference.adamw_norm([n.to(grads[0].device) for n in norms]) if norms else torch.zeros(())


def _listed(op, name, tensors):
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):
        raise ValueError(f"{op}: {name} must be a tensor or a list of them, got {type(tensors).__name__}")
    return list(tensors)


def _has_no_gaps(t: Tensor) -> bool:
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params):
    """Raises ValueError unless the lists go together."""
    for i, param in enumerate(params):
        if not isinstance(param, Tensor) or not param.is_floating_point():
            raise ValueError(f"adamw_: params[{i}] must be a floating-point tensor, got {checks.kind(param)}")
    first = params[0]
    state = exp_avgs[0].dtype if exp_avgs and isinstance(exp_avgs[0], Tensor) else first.dtype
    if state not in (first.dtype, torch.float32):
        rule = f"have params' dtype {first.dtype} or torch.float32"
        raise ValueError(f"adamw_: exp_avgs[0] must {rule}, got {state}")
    lists = {"params": (params, first.dtype), "grads": (grads, first.dtype), "exp_avgs": (exp_avgs, state),
             "exp_avg_sqs": (exp_avg_sqs, state)}  # fmt: skip
    optional = {"max_exp_avg_sqs": (max_exp_avg_sqs, state), "master_params": (master_params, torch.float32)}
    for name, (tensors, dtype) in (lists | {k: v for k, v in optional.items() if v[0]}).items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_: {name} must be {len(params)}, as params are, got {len(tensors)}")
        for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
            if not isinstance(t, Tensor) or t.shape != param.shape or t.dtype != dtype:
                rule = f"a tensor of shape {tuple(param.shape)} and dtype {dtype}"
                raise ValueError(f"adamw_: {name}[{i}] must be {rule}, got {checks.kind(t)}")
            if t.device != first.device:
                raise ValueError(f"adamw_: {name}[{i}] must be on device {first.device}, got {t.device}")
            if name != "grads" and t.stride() != param.stride():
                rule = f"have its parameter's strides {param.stride()}"
                raise ValueError(f"adamw_: {name}[{i}] must {rule}, got {t.stride()}")
    if master_params and (first.dtype not in _HALVES or state != torch.float32):
        rule = "be there beside bfloat16 or float16 params with float32 exp_avgs alone"
        raise ValueError(f"adamw_: master_params must {rule}, got {first.dtype} with {state}")


def _check_numbers(count, device, steps, lr, betas, eps, weight_decay, scale):
    """Raises ValueError unless the numbers are such as `count` tensors can be changed by."""
    if len(steps) != count:
        raise ValueError(f"adamw_: step must be one or {count}, as params are, got {len(steps)}")
    for step in steps:
        checks.integer("adamw_", "step", step, 1)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        checks.number("adamw_", name, value, 0, _INFINITY)
    checks.betas("adamw_", betas)
    if scale is not None:
        if not isinstance(scale, Tensor) or scale.numel() != 1 or scale.dtype != torch.float32:
            raise ValueError(f"adamw_: scale must be one torch.float32, got {checks.kind(scale)}")
        if scale.device != device:
            raise ValueError(f"adamw_: scale must be on device {device}, got {scale.device}")
