"""Modules whose own forward has chains of operations that one kernel does: proven, then found by torch.fx."""

from functools import partial

import torch
from torch import Tensor, fx, nn

from lspm_kernels.acceleration import aliases, attentions, image_chains, image_kernels, row_chains
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import Swap, original
from lspm_kernels.acceleration.tracing import Trace, child, code, trace
from lspm_kernels.nn import calls

_is_compiling = torch.compiler.is_compiling
_CHANNELS_LAST = torch.channels_last
_ORDINARY = (Tensor, nn.Parameter)


class Plans:
    """A module's forward with chains in it, for training and for evaluation, made when it is called."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.made: dict[bool, tuple] = {}
        self.of_images = False  # whether all chains are of images, as far as a call has shown

    def __getstate__(self) -> dict:
        return {"options": self.options, "made": {}, "of_images": False}  # a copy has modules of its own

    def of(self, module: nn.Module) -> tuple:
        """(its trace, or None where it is left alone; its code; whether it sets the memory format)."""
        plan = self.made.get(module.training)
        if plan is None or not (plan[0] is None or plan[0].reads.hold(module)):
            *plan, self.of_images = _plan(module, self.options)
            plan = self.made[module.training] = tuple(plan)
        return plan


class Traced:
    """A module whose forward is its own with chains in it."""

    def forward(self, *args, **kwargs):
        followed = _is_compiling() or calls.watched()
        if followed or (self.lspm.of_images and args and _is_torchs(args[0], self.lspm.options)):
            return super().forward(*args, **kwargs)
        found, function, sets_format = self.lspm.of(self)
        if found is None:
            return super().forward(*args, **kwargs)
        if kwargs or len(args) != len(found.inputs):
            given = _bound(found, args, kwargs)
            if given is None:
                return super().forward(*args, **kwargs)
        else:
            given = args
        for x in given:
            if type(x) not in _ORDINARY:
                return super().forward(*args, **kwargs)
        if sets_format and len(given) == 1 and _is_changed(given[0], self.lspm.options):
            out = function(self, given[0].contiguous(memory_format=_CHANNELS_LAST))
            return out if _has_channels_last(self) else _contiguous(out)
        return function(self, *given)


def _bound(found: Trace, args, kwargs) -> tuple | None:
    """The inputs in their order, where all else is as it was traced."""
    if len(args) > len(found.names):
        return None
    named = dict(zip(found.names, args, strict=False))
    if named.keys() & kwargs.keys():
        return None
    named |= kwargs
    for name, default in found.defaults.items():
        if named.pop(name, default) is not default:
            return None
    return tuple(named[n] for n in found.inputs) if named.keys() == set(found.inputs) else None


def _is_changed(x: Tensor, options: Options) -> bool:
    """Whether an image is to be channels_last inside, and its output contiguous again."""
    return x.dim() == 4 and x.is_cpu and x.is_contiguous() and image_kernels.pays(x, options.inference)


def _is_torchs(x, options: Options) -> bool:
    """Whether an image lies as our kernels do not take it, and is too small to be laid out anew."""
    if type(x) is not Tensor or x.dim() != 4 or x.is_contiguous(memory_format=_CHANNELS_LAST):
        return False
    return not image_kernels.pays(x, options.inference)


def _has_channels_last(module: nn.Module) -> bool:
    """Whether torch's convolutions would give channels_last images, as their weights lie so."""
    return any(calls.channels_last(m.weight) for m in module.modules() if isinstance(m, nn.Conv2d))


def _contiguous(out):
    if isinstance(out, Tensor):
        return out.contiguous() if out.dim() == 4 else out
    if type(out) in (tuple, list):
        return type(out)(map(_contiguous, out))
    return {k: _contiguous(v) for k, v in out.items()} if type(out) is dict else out


def _plan(module: nn.Module, options: Options) -> tuple:
    found = trace(module)
    if isinstance(found, str) or aliases.hazard(module, found):
        return None, None, False, False
    graph = fx.Graph()
    copies: dict = {}
    graph.output(graph.graph_copy(found.graph, copies))
    chains = _chains(module, graph, options)
    of_images = all(isinstance(chain, image_kernels.Chain) for chain in chains)
    for chain in chains:
        last = chain.nodes[-1]
        with graph.inserting_after(last):
            fused = graph.create_node("call_function", chain, chain.inputs(), name="chain")
        last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
        chain.nodes = []
    sets_format = aliases.suits_any_format(module, False) and _convolves(module)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is attentions.TORCHS:
            node.target = partial(attentions.attend, attentions.TORCHS)
        if sets_format and node.op == "call_method" and node.target == "view":
            node.target = "reshape"
    return found, code(module, graph), sets_format, of_images


def _chains(module, graph, options):
    # For inference the linear layers have copies of their weights, which only they themselves read.
    rows = [] if options.inference else row_chains.find(module, graph)
    return [*image_chains.find(module, graph, options), *rows]


def _convolves(module: nn.Module) -> bool:
    """Whether most of a module's convolutions are in chains: else changing the memory format may not pay."""
    convolutions = sum(original(m) is nn.Conv2d for m in module.modules())
    return 0 < convolutions < 2 * sum(map(_own_convolutions, module.modules()))


def _own_convolutions(module: nn.Module) -> int:
    found = trace(module) if module._modules else None
    if not isinstance(found, Trace):
        return 0
    return sum(chain.conv is not None for chain in image_chains.find(module, found.graph, Options()))


def rule(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """For modules with children, of any class but torch.nn's other than Sequential."""
    cls = original(module)
    if not module._modules or (cls.__module__.startswith("torch.nn.") and cls is not nn.Sequential):
        return None
    if issubclass(cls, nn.ModuleList | nn.ModuleDict):
        return None
    found = trace(module)
    if isinstance(found, str):
        direct = any(original(m) in (nn.Conv2d, nn.BatchNorm2d) for m in module.children())
        return found if direct else None
    if reason := aliases.hazard(module, found):
        return reason
    chains = _chains(module, found.graph, options)
    inner = [child(module, n) for n in found.graph.nodes if n.op == "call_module"]
    if not chains and not (_convolves(module) and aliases.suits_any_format(module, True) and inner):
        return None
    said = dict.fromkeys(chain.name for chain in chains) or {"channels_last inside": None}
    if any(node.target is attentions.TORCHS for node in found.graph.nodes):
        said["scaled_dot_product_attention"] = None
    return Swap(Traced, ", ".join(said), Plans(options))
