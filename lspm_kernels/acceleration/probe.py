"""What a module gives for inputs and parameters that are not its own, compared with a definition."""

import torch
from torch import Tensor

from lspm_kernels.acceleration.swap import original

# What a forward that is probed with an input that it does not expect may raise.
REFUSALS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def run(function, x, given) -> list[Tensor]:
    """The output of function(x, given), and the gradients of a sum of it, weighted."""
    x, given = x.clone().requires_grad_(), {k: v.clone().requires_grad_() for k, v in given.items()}
    with torch.enable_grad():
        y = function(x, given)
        if type(y) is not Tensor or y.dtype != x.dtype or y.shape[:-1] != x.shape[:-1] or not y.requires_grad:
            raise TypeError
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, [x, *given.values()], weights)]


def outcome(module, given, x, training) -> list[Tensor] | None:
    """The same of a module's forward, on a copy with other parameters; None if it changes itself or x."""
    probed = object.__new__(original(module))
    state = {**vars(module), "training": training, "_parameters": dict(given)}
    vars(probed).update(state)

    def forward(x, given):
        probed._parameters.update(given)
        kept = x.detach().clone()
        y = probed.forward(x)
        if y is x or not torch.equal(x, kept):
            raise TypeError
        return y

    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            found = run(forward, x, given)
    except REFUSALS:
        return None
    unchanged = vars(probed).keys() == state.keys() and all(vars(probed)[k] is v for k, v in state.items())
    return found if unchanged else None


def keeps_half_types(module, given, x) -> bool:
    """Whether bfloat16 gives bfloat16; the values say little then."""
    half = {name: value.bfloat16() for name, value in given.items()}
    return outcome(module, half, x.bfloat16(), False) is not None


def close(outcome, truth, allowed) -> bool:
    """Whether y errs by no more than allowed, and gradients by little: a lost term is far more."""
    y, *gradients = ((one.double() - other).abs() for one, other in zip(outcome, truth, strict=True))
    pairs = zip(gradients, truth[1:], strict=True)
    return bool((y <= allowed).all()) and all(
        bool((error <= 1e-4 * true.abs().amax(-1, keepdim=True) + 1e-9).all()) for error, true in pairs
    )
