"""Which module becomes what: rules in the order in which they are asked."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lspm_kernels.acceleration import graphs, heads, layers, lookalike_layers, own_calls, weight_copies
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import Swap

# A rule takes (model, path, module, options) and gives a Swap, or why the module is left alone, or None
# where it knows nothing of such modules. It changes nothing.
Rule = Callable[[nn.Module, str, nn.Module, Options], Swap | str | None]
RULES: tuple[Rule, ...] = (
    weight_copies.rule,
    heads.rule,
    layers.rule,
    lookalike_layers.rule,
    graphs.rule,
    own_calls.rule,
)


def find(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """What the first rule that knows the module says."""
    if reason := _untouchable(module):
        return reason
    for rule in RULES:
        if (found := rule(model, path, module, options)) is not None:
            return found
    return None


def _untouchable(module: nn.Module) -> str | None:  # noqa: PLR0911 -- a reason a line
    """Why nothing can be done to a module, whatever it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled TorchScript"
    if isinstance(module, LazyModuleMixin):  # which sets its class itself, at its first call
        return "its parameters have no shape yet"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.layout != torch.strided:
            return f"{name} is sparse"
        if tensor.is_quantized:
            return f"{name} is quantised"
    if "forward" in vars(module):
        return "its forward was set on the object"
    return None
