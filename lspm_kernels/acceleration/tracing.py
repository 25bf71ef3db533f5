"""One module's own forward as a graph of operations, of which a child is one; and that as code again."""

import inspect
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from lspm_kernels.acceleration import purity, statements
from lspm_kernels.acceleration.probe import REFUSALS
from lspm_kernels.acceleration.swap import original

Node = fx.Node
# What torch.fx raises where a forward asks a tensor for what is not known yet, or what that leads to.
_REFUSALS = (*REFUSALS, fx.proxy.TraceError)
_IN_PLACE = {
    f"__{name}__": getattr(operator, name)
    for name in "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
}


@dataclass
class Trace:
    """A graph, the names of its inputs, the defaults that it was specialised to, and what it depends on."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    defaults: dict[str, object]
    names: tuple[str, ...]  # of all arguments, in their order
    reads: purity.Reads


class _Proxy(fx.Proxy):
    """torch.fx's, but `x += y` is not `x + y`: it keeps x's memory and dtype."""

    def __getattr__(self, name):
        return _Attribute(self, name)


class _Attribute(_Proxy, fx.proxy.Attribute):
    """One of a proxy's attributes."""


for _name, _function in _IN_PLACE.items():
    setattr(
        _Proxy,
        _name,
        lambda self, other, function=_function: self.tracer.create_proxy(
            "call_function", function, (self, other), {}
        ),
    )


class _Tracer(fx.Tracer):
    """torch.fx's, which changes how modules are called in all threads: here in its own alone."""

    proxy_buffer_attributes = True

    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()

    def proxy(self, node):
        return _Proxy(node, self)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def create_arg(self, a):
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise TypeError("a tensor that is no argument")
        return super().create_arg(a)


_known: WeakKeyDictionary = WeakKeyDictionary()
_lock = threading.Lock()


def trace(module: nn.Module) -> Trace | str:
    """The graph of a module's forward as it is now, or why there is none."""
    known = _known.setdefault(module, {})
    found = known.get(module.training)
    if found is None or (isinstance(found, Trace) and not found.reads.hold(module)):
        found = known[module.training] = _trace(module)
    return found


def _trace(module):
    cls = original(module)
    if "forward" in vars(module):
        return "its forward was set on the object"
    try:
        reads = purity.reads(module, cls)
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        if not all(isinstance(value, bool | int | float | str | None) for value in defaults.values()):
            raise statements.Unproven("its forward has a default of a kind of its own")
        shell = object.__new__(cls)
        vars(shell).update(vars(module))
        with _lock:
            graph = _Tracer().trace(shell, concrete_args=dict(defaults) or None)
    except statements.Unproven as reason:
        return str(reason)
    except _REFUSALS as reason:
        return (
            f"torch.fx cannot follow its forward: {str(reason).splitlines()[0] if str(reason) else reason!r}"
        )
    _drop(graph, defaults)
    names = tuple(p.name for p in parameters)
    inputs = tuple(n.target for n in graph.nodes if n.op == "placeholder")
    if inputs != tuple(name for name in names if name not in defaults):
        return "its forward's arguments are not plain"
    return Trace(graph, inputs, defaults, names, reads)


def _drop(graph, defaults):
    """Takes away what torch.fx says of arguments that have become constants."""
    doomed = {n for n in graph.nodes if n.op == "placeholder" and n.target.removesuffix("_1") in defaults}
    for node in graph.nodes:
        if doomed & set(node.all_input_nodes):
            doomed.add(node)
    for node in reversed([n for n in graph.nodes if n in doomed]):
        graph.erase_node(node)


def child(module: nn.Module, node: Node) -> nn.Module | None:
    """The module that a node calls."""
    return module.get_submodule(node.target) if node.op == "call_module" else None


def overwritten(module: nn.Module, node: Node) -> Node | None:
    """The input that an operation works on in place."""
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if node.op == "call_module":
        return first if getattr(child(module, node), "inplace", False) is True else None
    if node.op == "call_method":
        return first if node.target.endswith("_") and not node.target.endswith("__") else None
    if node.op != "call_function":
        return None
    name, out = getattr(node.target, "__name__", ""), node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    places = node.target in _IN_PLACE.values() or node.kwargs.get("inplace") or name.endswith("_")
    return first if places or (True in node.args[1:] and name in _LAST_IS_INPLACE) else None


_LAST_IS_INPLACE = {"relu", "relu6", "silu", "hardswish", "hardtanh", "elu", "leaky_relu", "dropout", "mish"}


def code(module: nn.Module, graph: fx.Graph) -> Callable:
    """A function of a module and the graph's inputs that does what the graph says, operation by operation."""
    constants: dict[str, object] = {}
    last = {used: node for node in graph.nodes for used in node.all_input_nodes}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        itself, args = (node.args[0], node.args[1:]) if node.op == "call_method" else (None, node.args)
        arguments = ", ".join(
            [_text(a, constants) for a in args]
            + [f"{name}={_text(a, constants)}" for name, a in node.kwargs.items()]
        )
        if node.op == "output":
            lines.append(f"return {_text(node.args[0], constants)}")
            continue
        if node.op == "call_module":
            value = f"{_member(node.target, 'module')}({arguments})"
        elif node.op == "get_attr":
            value = _member(node.target, _kind(module, node.target))
        elif node.op == "call_method":
            value = f"{_text(itself, constants)}.{node.target}({arguments})"
        else:
            value = f"{_text(node.target, constants)}({arguments})"
        done = [n.name for n in node.all_input_nodes if last[n] is node and n.op != "output"]
        lines.append("; ".join([f"{node.name} = {value}", *(f"{name} = None" for name in done)]))
    inputs = ", ".join(["_module", *(n.name for n in graph.nodes if n.op == "placeholder")])
    body = "\n    ".join(lines)
    exec(f"def forward({inputs}):\n    {body}", constants)
    return constants["forward"]


def _text(value, constants):  # noqa: PLR0911 -- one kind of value a line
    if isinstance(value, Node):
        return value.name
    if isinstance(value, tuple):
        return "(" + "".join(f"{_text(v, constants)}, " for v in value) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_text(v, constants) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v, constants)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_text(v, constants) for v in (value.start, value.stop, value.step))})"
    if type(value) in (int, bool, str, type(None)):
        return repr(value)
    name = f"_constant_{len(constants)}"
    constants[name] = value
    return name


def _member(path, kind):
    *outer, last = path.split(".")
    found = "_module" + "".join(f"._modules[{name!r}]" for name in outer)
    return f"{found}._modules[{last!r}]" if kind == "module" else f"{found}.{last}"


def _kind(module, path):
    owner, _, name = path.rpartition(".")
    return "module" if name in module.get_submodule(owner)._modules else "tensor"
