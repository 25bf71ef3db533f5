"""Whether a model that was made faster gives what it gave, by one rule for outputs and gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from lspm_kernels.bench_target import UsageError

RULE = "2 x what the model itself errs against float64, + eps x max(1, max |truth|)"


@dataclass(frozen=True)
class Comparison:
    """How much one result errs against float64, before and after, and what the rule allows."""

    name: str
    before: float
    after: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.after <= self.allowed


def loss_of(output: object) -> Tensor:
    """output.loss, or the sum of all that is in output and has a gradient.

    Raises:
        UsageError: there is no such thing.
    """
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    sums = [t.float().sum() for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not sums:
        raise UsageError("MODEL must return a tensor with a gradient for --training, got none")
    return torch.stack(sums).sum()


def results(model: nn.Module, call: Callable, training: bool, seed: int = 0) -> dict[str, Tensor]:
    """The outputs of call(model), and with training the gradients of parameters, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(training):
        output = call(model)
    pairs = tree_flatten_with_path(output)[0]
    named = {f"output{torch.utils._pytree.keystr(path)}": t for path, t in pairs}
    found = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if training:
        _weighted(output, found).backward()
        named = model.named_parameters()
        found |= {f"gradient of {n}": p.grad for n, p in named if p.grad is not None}
        model.zero_grad(set_to_none=True)
    return {name: t.detach().double().cpu() for name, t in found.items()}


def _weighted(output, found):
    """The loss; without one a sum with weights, since the plain sum's gradient may be 0, as behind a norm."""
    if isinstance(getattr(output, "loss", None), Tensor):
        return output.loss
    wanted = [t for t in found.values() if t.requires_grad]
    if not wanted:
        return loss_of(output)
    weights = (torch.linspace(-1, 2, t.numel(), device=t.device, dtype=t.dtype).view(t.shape) for t in wanted)
    return sum((t * w).sum() for t, w in zip(wanted, weights, strict=True))


def compare(
    before: dict[str, Tensor], after: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> list[Comparison]:
    """Every result of before, the one that uses most of what is allowed first.

    One that is missing afterwards, of another shape, or not finite where it was, errs without end.
    """
    found = []
    for name, own in before.items():
        if (true := truth.get(name)) is None:
            raise UsageError(f"MODEL must give in float64 what it gives otherwise, got no {name}")
        mine = after.get(name)
        finite = own.isfinite() & true.isfinite()
        scale = true[finite].abs().max().item() if finite.any() else 0.0
        errors = [_error(t, true, finite) for t in (own, mine)]
        allowed = 2 * errors[0] + torch.finfo(dtype).eps * max(1.0, scale)
        found.append(Comparison(name, *errors, allowed))
    return sorted(found, key=lambda c: -c.after / c.allowed)


def _error(t, true, finite):
    if t is None or t.shape != true.shape or not t[finite].isfinite().all():
        return float("inf")
    return (t - true)[finite].abs().max().item() if finite.any() else 0.0
