"""Where in a traced forward a convolution, a batch norm, a sum and an activation follow each other."""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lspm_kernels.acceleration.aliases import is_overtaken
from lspm_kernels.acceleration.image_kernels import ACTIVATIONS, Chain
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import original
from lspm_kernels.acceleration.tracing import Node, child

_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu"}
_FUNCTIONS |= {F.relu_: "relu", torch.relu_: "relu"}
_SUMS = {operator.add, operator.iadd, torch.add}


def find(module: nn.Module, graph: fx.Graph, options: Options) -> list[Chain]:
    """The chains of a graph, each of two operations or more; no node is in two."""
    called = [n.target for n in graph.nodes if n.op == "call_module"]
    chains: list[Chain] = []
    for node in graph.nodes:
        kind = original(child(module, node)) if node.op == "call_module" else None
        if kind not in (nn.Conv2d, nn.BatchNorm2d) or any(node in chain.nodes for chain in chains):
            continue
        if len(node.args) != 1 or node.kwargs or called.count(node.target) > 1:
            continue
        chain = _grow(module, node, kind, options, {n for chain in chains for n in chain.nodes})
        if len(chain.nodes) > 1 and not is_overtaken(module, chain.nodes):
            chains.append(chain)
    return chains


def _grow(module, node, kind, options, taken) -> Chain:
    chain = Chain(nodes=[node], inference=options.inference)
    if kind is nn.Conv2d:
        chain.conv = child(module, node)
        follower = _only_user(node)
        if follower is not None and follower.op == "call_module" and follower.args == (node,):
            if original(child(module, follower)) is nn.BatchNorm2d:
                chain.norm = child(module, follower)
                chain.nodes.append(follower)
    else:
        chain.norm = child(module, node)
    follower = _only_user(chain.nodes[-1])
    if follower is not None and follower not in taken and _is_sum(follower):
        target = getattr(Tensor, follower.target) if follower.op == "call_method" else follower.target
        is_first = follower.args[0] is chain.nodes[-1]
        chain.add = target if is_first else lambda y, residual: target(residual, y)
        chain.sum = follower
        chain.nodes.append(follower)
    follower = _only_user(chain.nodes[-1])
    if follower is not None and follower not in taken:
        chain.activation, chain.act = _activation(module, follower)
        if chain.act is not None:
            chain.nodes.append(follower)
    return chain


def _only_user(node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node) -> bool:
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return False
    sums = ("add", "add_") if node.op == "call_method" else _SUMS
    return (
        node.op in ("call_method", "call_function") and node.target in sums and node.args[0] != node.args[1]
    )


def _activation(module, node) -> tuple[str | None, Callable | None]:
    """What conv2d calls an operation, and that operation."""
    if node.op == "call_module":
        act = child(module, node)
        name = ACTIVATIONS.get(original(act))
        if name is None or node.kwargs or (name == "gelu" and act.approximate != "none"):
            return None, None
        return name, act
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu", getattr(Tensor, node.target)
    name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name is None or (name == "gelu" and node.kwargs):
        return None, None
    return name, lambda y: node.target(y, *node.args[1:], **node.kwargs)
