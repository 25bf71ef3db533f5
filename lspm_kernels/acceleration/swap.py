"""A module made faster by its class: the same object, its parameters, hooks and name; and that undone.

`swap(module, Faster)` gives one object a subclass of its own class, in which Faster comes first: forward is
Faster's, and where that does not take a call, super().forward() is what the module did before. So what else
holds the module holds the faster one, state_dict is what it was, and `unswap` has nothing to put back but the
class.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# What vars() of any module has, whatever it computes; `lspm` while it is swapped.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"lspm"}


class Swapped:
    """What all classes have that swap makes."""

    lspm_original: type[nn.Module]
    lspm_faster: type

    def __reduce_ex__(self, protocol):
        """As the parts of the class, which no module holds by its name."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _bare, (self.lspm_faster, self.lspm_original), state

    def __prepare_scriptable__(self):
        """What torch.jit.script asks for, which compiles no forward of ours."""
        rule = "a model given to torch.jit.script must have its own classes"
        raise RuntimeError(f"accelerate: {rule}, got a replaced {type(self).__name__}: restore(model) first")


@dataclass(frozen=True)
class Swap:
    """What a rule wants of a module: the class Faster, what that needs to know, and how a report calls it.

    state is kept as the module's attribute `lspm` as long as it is swapped; it can be copied and pickled.
    """

    faster: type
    what: str
    state: Any = field(default=None)


def swap(module: nn.Module, wanted: Swap) -> None:
    """Gives a module, which is not swapped, the class that is wanted."""
    module.__class__ = _class(wanted.faster, type(module))
    if wanted.state is not None:
        module.__dict__["lspm"] = wanted.state


def unswap(module: nn.Module) -> None:
    """Gives a swapped module its own class back, and its own forward to who kept ours on the object.

    So do the hooks of Hugging Face's accelerate, and leave it there when they are removed.
    """
    ours, cls = type(module).forward, type(module).lspm_original
    module.__class__ = cls
    module.__dict__.pop("lspm", None)
    for name, value in vars(module).items():
        if isinstance(value, types.MethodType) and value.__func__ is ours:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module's class was made by swap; a class derived from one, as FSDP's, was not."""
    return "lspm_original" in vars(type(module))


def original(module: nn.Module) -> type[nn.Module]:
    """The class that a module was given by who made it."""
    return type(module).lspm_original if is_swapped(module) else type(module)


@functools.cache
def _class(faster: type, cls: type[nn.Module]) -> type[nn.Module]:
    # Who asks for the name of a class, or for its forward's signature, gets those of the one it stands for.
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    code = faster.forward
    forward = types.FunctionType(
        code.__code__, code.__globals__, code.__name__, code.__defaults__, code.__closure__
    )
    forward.__kwdefaults__ = code.__kwdefaults__
    functools.update_wrapper(forward, cls.forward)
    own = {"lspm_original": cls, "lspm_faster": faster, "forward": forward, "__init__": _init(cls)}
    namespace = named | own
    bases = (Swapped, faster) if issubclass(faster, cls) else (Swapped, faster, cls)
    return types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))


def _init(cls: type[nn.Module]) -> Callable[..., None]:
    """That of a class that stands for cls: who calls it, as type(model)(config) does, means cls."""

    @functools.wraps(cls.__init__)
    def init(self, *args, **kwargs):
        if is_swapped(self):
            object.__setattr__(self, "__class__", cls)  # a module's own needs what its __init__ makes
        cls.__init__(self, *args, **kwargs)

    return init


def _bare(faster: type, cls: type[nn.Module]) -> nn.Module:
    made = _class(faster, cls)
    return made.__new__(made)
