"""Linear layers and what stands between them in a traced forward: mlp, gated_mlp and bias_act."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lspm_kernels import checks, dispatch, products
from lspm_kernels.acceleration.aliases import is_overtaken, unhooked
from lspm_kernels.acceleration.image_kernels import is_special
from lspm_kernels.acceleration.lookalikes import Meaning, meaning
from lspm_kernels.acceleration.swap import original
from lspm_kernels.acceleration.tracing import Node, child
from lspm_kernels.ops import bias_act, mlp, swiglu

_LEAST = 2**14  # numbers of x below which a call takes longer than its work
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.silu: "silu"}
_METHODS = {"relu": "relu"}
_PRODUCTS = {operator.mul, torch.mul}
_ORDINARY = (Tensor, nn.Parameter)
_EMPTY = vars(nn.Module()).keys() | {"lspm"}


class Known:
    """A module whose meaning was found, as long as it is what it was."""

    def __init__(self, module: nn.Module, found: Meaning) -> None:
        self.module, self.found, self.cls = module, found, original(module)
        self.own = {name: value for name, value in vars(module).items() if name not in _EMPTY}
        self.named = self._named()

    def holds(self) -> bool:
        state = vars(self.module)
        return (
            original(self.module) is self.cls
            and unhooked(self.module)
            and self._named() == self.named
            and all(state.get(name) is value for name, value in self.own.items())
        )

    def _named(self) -> list[str]:
        return [name for name, p in self.module._parameters.items() if p is not None]

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """weight (out, in) and bias."""
        weight, bias = getattr(self.module, self.found.weight), self.found.bias
        return weight.t() if self.found.transposed else weight, bias and getattr(self.module, bias)


@dataclass(eq=False)
class Chain:
    """What one call does: by a kernel where that takes it, else step by step as the forward did.

    Its parts are up to three linear layers, in the order in which they are called, and the activation of the
    first; between it and the last may stand what does nothing.
    """

    linears: list[Known]
    act: Callable
    activation: str
    nodes: list[Node]
    known_act: Known | None = None
    product: Callable | None = None
    idle: list[nn.Dropout | nn.Identity] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Which op it is."""
        if self.product is not None:
            return f"gated_mlp of {self.activation}"
        return f"{'mlp' if len(self.linears) == 2 else 'linear and'} of {self.activation}"

    def inputs(self) -> tuple[Node, ...]:
        """What it reads, as the graph is now."""
        return self.nodes[0].args

    def __call__(self, x: Tensor) -> Tensor:
        parameters = self._taken(x)
        if parameters is None:
            return self._steps(x)
        if self.product is not None:
            return mlp.gated_mlp(x, *(weight for weight, _ in parameters), activation=self.activation)
        (weight, bias), *rest = parameters
        if rest:
            return mlp.mlp(x, weight, bias, *rest[0], activation=self.activation)
        y = products.linear(products.flat(x), weight).view(*x.shape[:-1], len(weight))
        return bias_act.bias_act(y, bias, self.activation)

    def _steps(self, x):
        first, *rest = (known.module for known in self.linears)
        y = self.act(first(x))
        if self.product is not None:
            y = self.product(y, rest.pop(0)(x))
        for module in (*self.idle, *rest):
            y = module(y)
        return y

    def _taken(self, x) -> list[tuple[Tensor, Tensor | None]] | None:
        """The parameters of the linear layers, where the kernel takes the call."""
        large = type(x) in _ORDINARY and x.numel() >= _LEAST and x.shape[:-1].numel() >= products.LEAST
        if not large or not x.is_cpu or is_special():
            return None
        autocasts = checks.autocasts(x.device)
        dtype = torch.get_autocast_dtype("cpu") if autocasts else x.dtype
        if not dispatch.admitting("mlp", mlp.BACKENDS, x) or (autocasts and len(self.linears) == 1):
            return None
        if not all(unhooked(m) and (not m.training or getattr(m, "p", 0) == 0) for m in self.idle):
            return None
        if not all(known.holds() for known in (*self.linears, self.known_act) if known is not None):
            return None
        parameters = [known.parameters() for known in self.linears]
        for weight, bias in parameters:
            for t in (weight, bias):
                if t is not None and (
                    type(t) not in _ORDINARY
                    or not t.is_cpu
                    or t.layout is not torch.strided
                    or t.dtype not in ((dtype, torch.float32) if autocasts else (dtype,))
                ):
                    return None
        return parameters if parameters[0][0].shape[1] == x.shape[-1] else None


def find(module: nn.Module, graph: fx.Graph) -> list[Chain]:
    """The chains of a graph; no node is in two."""
    chains: list[Chain] = []
    for node in graph.nodes:
        if not any(node in chain.nodes for chain in chains):
            chain = _grow(module, node)
            if chain is not None and not is_overtaken(module, chain.nodes):
                chains.append(chain)
    return chains


def _grow(module, node) -> Chain | None:
    first = _linear(module, node)
    if first is None:
        return None
    act = _only_user(node)
    activation, function, known = (None, None, None) if act is None else _activation(module, act)
    if activation is None:
        return None
    chain = Chain([first], function, activation, [node, act], known)
    follower = _only_user(act)
    gate = follower is not None and follower.op == "call_function" and follower.target in _PRODUCTS
    if gate and activation in swiglu.ACTIVATIONS:
        return _gated(module, chain, follower)
    while follower is not None and _may_be_idle(module, follower):
        chain.idle.append(child(module, follower))
        chain.nodes.append(follower)
        follower = _only_user(follower)
    last = follower and _linear(module, follower)
    if last is not None:
        chain.linears.append(last)
        chain.nodes.append(follower)
    else:
        chain.nodes = [n for n in chain.nodes if n in (node, act)]
        chain.idle = []
    return chain if last is not None or products.faster else None


def _gated(module, chain, follower) -> Chain | None:
    """down(act(gate(x)) * up(x)), of layers without biases."""
    node, act = chain.nodes
    others = [a for a in follower.args if a is not act]
    up = _linear(module, others[0]) if len(others) == 1 and isinstance(others[0], Node) else None
    last = _only_user(follower)
    down = last and _linear(module, last)
    if up is None or down is None or others[0].args != node.args or len(others[0].users) > 1:
        return None
    linears = [chain.linears[0], up, down]
    if any(known.found.bias is not None for known in linears) or follower.kwargs:
        return None
    chain.linears, chain.product = linears, follower.target
    chain.nodes = sorted([*chain.nodes, others[0], follower, last])
    return chain


def _linear(module, node) -> Known | None:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    layer = child(module, node)
    found = meaning(layer)
    return Known(layer, found) if found is not None and found.kind == "linear" else None


def _activation(module, node) -> tuple[str | None, Callable | None, Known | None]:
    """What mlp calls an operation, that operation, and what it depends on."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        act = child(module, node)
        found = meaning(act)
        if found is None or found.kind != "activation":
            return None, None, None
        return found.activation, act, Known(act, found)
    name = None
    if node.op == "call_method":
        name = _METHODS.get(node.target)
        return name, name and getattr(Tensor, name), None
    if node.op == "call_function":
        name = _FUNCTIONS.get(node.target)
        if node.target is F.gelu:
            name = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return name, lambda y: node.target(y, *node.args[1:], **node.kwargs), None


def _may_be_idle(module, node) -> bool:
    return node.op == "call_module" and original(child(module, node)) in (nn.Dropout, nn.Identity)


def _only_user(node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
