"""Which operations of a traced forward write into memory that something else reads, or ask how it lies."""

from torch import nn

from lspm_kernels.acceleration.swap import is_swapped, original
from lspm_kernels.acceleration.tracing import Node, Trace, child, overwritten, trace
from lspm_kernels.nn import calls

ACTIVATIONS = {
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU,
    nn.ELU, nn.Mish, nn.Hardtanh, nn.Softplus,
}  # fmt: skip
# Layers that give memory of their own, and those that any memory format of an image suits.
_FRESH_OF_IMAGES = {
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, nn.ZeroPad2d,
    nn.ReflectionPad2d,
}  # fmt: skip
_FRESH = _FRESH_OF_IMAGES | {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding}
_OF_ANY_FORMAT = _FRESH | ACTIVATIONS | {nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, nn.Softmax}
_FRESH_FUNCTIONS = {
    "add", "sub", "mul", "truediv", "matmul", "cat", "concat", "conv2d", "linear", "adaptive_avg_pool2d",
    "avg_pool2d", "max_pool2d", "boolean_dispatch", "mean", "sum", "relu", "relu6", "silu", "gelu", "sigmoid",
    "tanh", "hardswish", "hardsigmoid", "batch_norm", "layer_norm", "softmax", "interpolate", "rsqrt", "pow",
}  # fmt: skip
_ASK_FOR_FORMAT = {
    "view",
    "stride",
    "is_contiguous",
    "as_strided",
    "data_ptr",
    "storage_offset",
    "untyped_storage",
}


def unhooked(module: nn.Module) -> bool:
    """Whether a module does what its class does."""
    return calls.unhooked(module) and "forward" not in vars(module)


def hazard(module: nn.Module, found: Trace) -> str | None:
    """Why the operations of a forward may not change their order or their memory."""
    for node in found.graph.nodes:
        written = overwritten(module, node)
        if written is not None and any(
            n.op in ("placeholder", "get_attr") or len(n.users) > 1 for n in _may_share(module, written)
        ):
            return f"`{node.name}` of its forward works in place on what else is read"
    return None


def _may_share(module, node) -> set[Node]:
    """The nodes whose memory a node's may be."""
    found, open_ = set(), [node]
    while open_:
        one = open_.pop()
        if one not in found:
            found.add(one)
            written = overwritten(module, one)
            if written is not None:  # what works in place gives what it wrote
                open_.append(written)
            elif not _is_fresh(module, one):
                open_ += one.all_input_nodes
    return found


def _is_fresh(module, node):
    if node.op == "call_module":
        return gives_own_memory(child(module, node))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _FRESH_FUNCTIONS


def gives_own_memory(module: nn.Module) -> bool:
    """Whether a module's output is memory that nothing else holds."""
    cls = original(module)
    if not unhooked(module):
        return False
    if cls in _FRESH or (cls in ACTIVATIONS and not getattr(module, "inplace", False)):
        return True
    found = trace(module) if module._modules else None
    if not isinstance(found, Trace):
        return False
    (out,) = (node.args[0] for node in found.graph.nodes if node.op == "output")
    return isinstance(out, Node) and all(
        n.op not in ("placeholder", "get_attr") for n in _may_share(module, out)
    )


def suits_any_format(module: nn.Module, swapping: bool) -> bool:
    """Whether a module may be given images in channels_last memory in place of others.

    swapping: while accelerate is at work, and those that can be swapped will be.
    """
    if not unhooked(module):
        return False
    if original(module) in _OF_ANY_FORMAT:
        return True
    found = trace(module) if module._modules else None
    if not isinstance(found, Trace) or hazard(module, found):
        return False
    asks = any(n.op == "call_method" and n.target in _ASK_FOR_FORMAT for n in found.graph.nodes)
    if asks and not (swapping or is_swapped(module)):
        return False
    return reshapes_only(found) and all(
        suits_any_format(child(module, n), swapping) for n in found.graph.nodes if n.op == "call_module"
    )


def reshapes_only(found: Trace) -> bool:
    """Whether `view`, which reshape stands in for, is all that a forward asks of how memory lies."""
    asked = {n.target for n in found.graph.nodes if n.op == "call_method"} & _ASK_FOR_FORMAT
    return asked <= {"view"}


def is_overtaken(module: nn.Module, nodes: list[Node]) -> bool:
    """Whether something between the first and the last of nodes may change what the first reads."""
    between, node = [], nodes[0].next
    while node is not nodes[-1]:
        if node not in nodes and node.op == "call_module":  # others that write there are a hazard
            between.append(node)
        node = node.next
    read = nodes[0].args[0]
    return any(
        read in n.all_input_nodes and not suits_any_format(child(module, n), swapping=True) for n in between
    )
