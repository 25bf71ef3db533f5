"""Whether a forward takes the same course whatever it is given, so that a few inputs speak for all.

Numbers alone prove nothing of a forward that asks for its input's size, dtype or gradient, or for what lies
elsewhere. So its source is read: what decides its course may be the module's own attributes alone, and these
are told, since a change of one is a change of the module.
"""

import ast
import builtins
import functools
import types

import torch
from torch import nn

from lspm_kernels.acceleration import source
from lspm_kernels.acceleration.statements import BUILTINS, NUMBERS, Unproven, path_of

_BUILTINS = {getattr(builtins, name) for name in (*BUILTINS, "super", "max", "min", "abs")}
_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, type(torch.Tensor.add), type(torch.Tensor.dim)
# What tells of a tensor's graph or memory, or of a mode: more than its numbers.
_STATE = {"requires_grad", "grad", "grad_fn", "data_ptr", "element_size", "initial_seed", "stride", "version"}
_ASKS = "is_", "get_", "are_"


@functools.cache
def read_by(cls: type[nn.Module]) -> frozenset[str] | None:
    """The attributes that a class's forward reads of its modules, or None where its course is not told."""
    found: set[str] = set()
    try:
        _read(cls, cls.forward, True, found, set())
    except Unproven:
        return None
    return frozenset(found)


def is_told(function: types.FunctionType) -> bool:
    """Whether the course of a function is the same for all that it may be given."""
    try:
        _read(object, function, False, set(), set())
    except Unproven:
        return False
    return True


def is_plain(value: object) -> bool:
    """Whether an attribute is what it is: a number, a name, a function of torch, or some of these."""
    if type(value) in (tuple, torch.Size):
        return all(map(is_plain, value))
    if type(value) is functools.partial:
        return all(map(is_plain, (value.func, *value.args, *value.keywords.values())))
    return type(value) in NUMBERS or (isinstance(value, _FUNCTIONS) and _is_torchs(value))


def _is_torchs(function) -> bool:
    return (getattr(function, "__module__", None) or "torch").split(".")[0] == "torch"


def _read(cls, function, is_method, found, seen) -> None:
    """Adds the attributes that a function reads of the module, its own first argument where it is a method.

    Raises:
        Unproven: its course may depend on what is no attribute.
    """
    function = source.unwrapped(function)
    if function in seen:
        return
    seen.add(function)
    tree = source.tree_of(function, changing=False)
    itself = tree.args.args[0].arg if is_method and tree.args.args else None
    _refuse_unless({*function.__code__.co_freevars} <= {"__class__"}, function)
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own = stored | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} | {"__class__"}
    attributes = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert | ast.comprehension):
            tests = node.ifs if isinstance(node, ast.comprehension) else [node.test]
            _refuse_unless(all(_is_settled(test, own - {itself}) for test in tests), function)
        _refuse_unless(not isinstance(node, ast.Global | ast.Nonlocal | ast.Match | ast.Try), function)
        if isinstance(node, ast.Attribute):
            _refuse_unless(not _asks_for_state(node.attr) and isinstance(node.ctx, ast.Load), function)
            if isinstance(node.value, ast.Name) and node.value.id == itself:
                _of_module(cls, node.attr, found, seen)
        elif isinstance(node, ast.Name) and node.id == itself:
            _refuse_unless(id(node) in attributes, function)
        elif isinstance(node, ast.Name) and node.id not in own and isinstance(node.ctx, ast.Load):
            _outside(cls, function, node.id, found, seen)
        if isinstance(node, ast.Attribute) and _is_super(node.value):
            _of_base(cls, function, node.attr, found, seen)


def _is_settled(test, local) -> bool:
    """Whether a condition asks nothing but attributes and what torch calls by a name."""
    inner = list(ast.walk(test))
    return not any(isinstance(n, ast.Call) or (isinstance(n, ast.Name) and n.id in local) for n in inner)


def _of_module(cls, name, found, seen) -> None:
    method = getattr(cls, name, None)
    if method is None:
        found.add(name)
    else:  # a number of the class, or a property, may change unseen
        if not isinstance(method, types.FunctionType):
            raise Unproven(f"{cls.__qualname__}.{name} is no method")
        if not _is_torchs(method):
            _read(cls, method, True, found, seen)


def _of_base(cls, function, name, found, seen) -> None:
    (defined,) = (c.cell_contents for c in function.__closure__ if isinstance(c.cell_contents, type))
    method = _base(defined, cls, name)
    if not _is_torchs(method):
        _read(cls, method, True, found, seen)
    elif name == "forward":  # torch's, which reads what its class holds
        found.update(getattr(cls, "__constants__", ()))


def _base(defined, cls, name):
    """What super().name is in a class's method for a module of cls."""
    classes = cls.__mro__[cls.__mro__.index(defined) + 1 :]
    return next((vars(base)[name] for base in classes if name in vars(base)), None)


def _outside(cls, function, name, found, seen) -> None:
    """A name of the function's file."""
    names = function.__globals__
    value = names[name] if name in names else getattr(builtins, name, None)
    if any(value is known for known in _BUILTINS):
        return
    if isinstance(value, types.ModuleType):
        _refuse_unless(value.__name__.split(".")[0] in ("torch", "math"), function)
        return
    if isinstance(value, type):
        _refuse_unless(_is_torchs(value), function)
        return
    _refuse_unless(isinstance(value, _FUNCTIONS) and not _asks_for_state(value.__name__), function)
    if not _is_torchs(value):
        _read(cls, value, False, found, seen)


def _asks_for_state(name: str) -> bool:
    return name in _STATE or name.startswith(_ASKS)


def _is_super(node) -> bool:
    return isinstance(node, ast.Call) and path_of(node.func) == ["super"] and not node.args


def _refuse_unless(holds: bool, function) -> None:
    if not holds:
        raise Unproven(f"the course of {function.__qualname__} is not told by its attributes")
