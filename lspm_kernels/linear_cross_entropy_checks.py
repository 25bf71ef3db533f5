"""The checks of linear_cross_entropy's arguments, and what autocast makes of them."""

import math

import torch
from torch import Tensor

from lspm_kernels import checks

_OP = "linear_cross_entropy"
_HALVES = (torch.bfloat16, torch.float16)


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    reductions: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks all but which classes the target holds; gives hidden, weight and bias as autocast has them.

    Raises: ValueError.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() == 0 or not hidden.is_floating_point():
        raise ValueError(f"{_OP}: hidden must be a floating-point tensor (..., D), got {checks.kind(hidden)}")
    checks.matrix(_OP, "weight", weight)
    if weight.shape[1] != hidden.shape[-1] or not len(weight):
        rule = f"(V, {hidden.shape[-1]}) with a class or more"
        raise ValueError(f"{_OP}: weight must be {rule}, got {tuple(weight.shape)}")
    if not isinstance(target, Tensor) or target.shape != hidden.shape[:-1]:
        rule = f"classes of shape {tuple(hidden.shape[:-1])}"
        raise ValueError(f"{_OP}: target must be {rule}, got {checks.shape(target)}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{_OP}: target must have dtype torch.int64 or torch.int32, got {target.dtype}")
    parameters = {"weight": weight, "bias": bias, "class_weight": class_weight}
    for name, t in parameters.items():
        if t is not None and name != "weight" and (not isinstance(t, Tensor) or t.shape != (len(weight),)):
            rule = f"be a tensor of shape ({len(weight)},)"
            raise ValueError(f"{_OP}: {name} must {rule}, got {checks.shape(t)}")
        cast = t is not None and t.dtype in _HALVES and checks.autocasts(hidden.device)
        if t is not None and not cast and t.dtype not in (hidden.dtype, torch.float32):
            rule = f"have hidden's dtype {hidden.dtype} or torch.float32"
            raise ValueError(f"{_OP}: {name} must {rule}, got {t.dtype}")
    if class_weight is not None and class_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: class_weight must not require a gradient, got requires_grad=True")
    checks.beside(_OP, "hidden", hidden.device, target=target, **parameters)
    checks.integer(_OP, "ignore_index", ignore_index)
    checks.probability(_OP, "label_smoothing", label_smoothing)
    checks.number(_OP, "z_loss", z_loss, 0, math.inf)
    if softcap is not None and not (isinstance(softcap, int | float) and 0 < softcap < math.inf):
        raise ValueError(f"{_OP}: softcap must be positive and finite, or None, got {softcap!r}")
    checks.one_of(_OP, "reduction", reduction, reductions)
    return _as_autocast_has_them(hidden, weight, bias)


def _as_autocast_has_them(hidden, weight, bias):
    """Products are in autocast's dtype; a float32 parameter is rounded to it block by block."""
    if not checks.autocasts(hidden.device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    kept = (t if t is None or t.dtype in (dtype, torch.float32) else t.to(dtype) for t in (weight, bias))
    return hidden.to(dtype), *kept
