"""Whether what a forward does depends on nothing that torch.fx would take for constant and that may change.

torch.fx runs a forward once and keeps the operations on its arguments; all else that Python decides is as it
was then. So a forward is read first: it may use its arguments, constants, functions of torch that are listed
here, attributes of its module, and its methods and functions that are proven alike. Which attributes it
reads is kept, so that a call can tell whether they are what they were.
"""

import inspect
import types
from dataclasses import dataclass, field

from torch import nn

from lspm_kernels.acceleration import source
from lspm_kernels.acceleration.statements import ABSENT, CONTAINERS, Body, Unproven


@dataclass
class Reads:
    """What a trace depends on: what the module holds itself, its class's functions, and containers.

    The module is not among it: what is kept of a module by a WeakKeyDictionary would keep it alive.
    """

    own: dict[str, object] = field(default_factory=dict)
    of_class: dict[str, object] = field(default_factory=dict)
    of_globals: list[tuple[dict, str, object]] = field(default_factory=list)
    children: dict[str, nn.Module | None] = field(default_factory=dict)
    containers: list[tuple[nn.Module, dict]] = field(default_factory=list)

    def hold(self, module: nn.Module) -> bool:
        """Whether all of it is the object that it was."""
        state, cls = vars(module), type(module)
        cls = getattr(cls, "lspm_original", cls)
        return (
            all(state.get(name, ABSENT) is value for name, value in self.own.items())
            and all(getattr(cls, name, None) is value for name, value in self.of_class.items())
            and module._modules == self.children
            and all(container._modules == children for container, children in self.containers)
            and all(names.get(name) is value for names, name, value in self.of_globals)
        )


def reads(module: nn.Module, cls: type[nn.Module]) -> Reads:
    """What the forward of a module of class cls reads.

    Raises:
        Unproven: it may depend on something else.
    """
    found = Reads(children=dict(module._modules))
    _keep_containers(found, module)
    if cls.__call__ is not nn.Module.__call__ or cls.__getattr__ is not nn.Module.__getattr__:
        raise Unproven("its class has its own way of being called")
    if cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__:
        found.of_class["forward"] = cls.forward
        return found
    _Reader(module, cls, found).method("forward")
    return found


def _keep_containers(found: Reads, module: nn.Module) -> None:
    for child in module._modules.values():
        if isinstance(child, CONTAINERS):
            found.containers.append((child, dict(child._modules)))
            _keep_containers(found, child)


class _Reader:
    """Reads functions, each once."""

    def __init__(self, module, cls, found):
        self.module, self.cls, self.found = module, cls, found
        self.seen: set = set()

    def method(self, name: str) -> None:
        function = inspect.getattr_static(self.cls, name)
        self.found.of_class[name] = function
        self.found.own[name] = ABSENT
        if isinstance(function, staticmethod):
            raise Unproven(f"{name} is a static method")
        self.function(function, is_method=True)

    def function(self, function, is_method=False) -> None:
        if not isinstance(function, types.FunctionType):
            raise Unproven(f"{function!r} is no function of Python")
        if function in self.seen:
            return
        self.seen.add(function)
        if function.__closure__ or hasattr(function, "__wrapped__"):
            raise Unproven(f"{function.__qualname__} has a decorator or a closure")
        Body(self, function, source.tree_of(function, changing=False), is_method).read()
