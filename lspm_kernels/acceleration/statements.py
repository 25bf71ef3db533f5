"""The statements and expressions of a function of which purity.py can tell what they depend on."""

import ast
import inspect
import math
import operator
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NUMBERS = (int, float, bool, str, type(None), torch.dtype)
BUILTINS = {"enumerate", "float", "int", "len", "list", "range", "reversed", "tuple", "zip"}
# Functions of tensors, which draw no random numbers unless torch.fx keeps the drawing.
_NAMES = """abs adaptive_avg_pool2d adaptive_max_pool2d add addcmul avg_pool2d batch_norm bmm cat chunk clamp
    concat conv2d cos cosine_similarity div dropout dropout2d einsum elu exp flatten gelu glu group_norm
    hardsigmoid hardswish hardtanh interpolate layer_norm leaky_relu linear log log_softmax matmul max_pool2d
    mean mish mul multiply narrow neg normalize pad permute pixel_shuffle pow relu relu6 relu_ reshape
    rms_norm rsqrt scaled_dot_product_attention selu sigmoid silu sin softmax softplus split sqrt square
    squeeze stack sub sum tanh transpose unflatten unsqueeze""".split()
FUNCTIONS = {
    function
    for place in (torch, F)
    for name in _NAMES
    if (function := getattr(place, name, None)) is not None
}
FUNCTIONS |= {math.ceil, math.floor, math.prod, math.sqrt, operator.add, operator.mul, operator.sub}
_STATEMENTS = (
    ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.If, ast.For, ast.Expr, ast.Pass, ast.Raise,
)  # fmt: skip
_EXPRESSIONS = (
    ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.IfExp, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Starred, ast.JoinedStr, ast.FormattedValue,
)  # fmt: skip


ABSENT = object()


class Unproven(Exception):  # noqa: N818 -- a finding, not a fault
    """A forward is left alone, and why."""


class Body:
    """One function's statements."""

    def __init__(self, reader, function, tree, is_method):
        self.reader, self.tree, self.globals = reader, tree, function.__globals__
        names = [arg.arg for arg in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
        if tree.args.vararg or tree.args.kwarg:
            raise Unproven(f"{tree.name} takes any number of arguments")
        self.itself = names[0] if is_method else None
        stores = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.locals = {*names, *stores} - {self.itself}
        if self.itself in stores:
            raise Unproven(f"it assigns to {self.itself}")
        # Locals that may be modules or what else the module holds: their attributes are not known.
        self.held: set[str] = set()

    def read(self) -> None:
        for statement in self.tree.body:
            self.statement(statement)

    def statement(self, node) -> None:
        if not isinstance(node, _STATEMENTS):
            self.refuse(node)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                self.store(target, node.value)
            if node.value is not None:
                self.expression(node.value)
            return
        if isinstance(node, ast.For):
            self.store(node.target, node.iter)
            self.expression(node.iter)
        elif isinstance(node, ast.If):
            self.expression(node.test)
        elif isinstance(node, ast.Return | ast.Expr) and node.value is not None:
            self.expression(node.value)
        body, orelse = getattr(node, "body", ()), getattr(node, "orelse", ())
        if isinstance(node, ast.If) and (taken := self.constant(node.test)) is not None:
            body, orelse = (body, ()) if taken else ((), orelse)
        for inner in (*body, *orelse):
            self.statement(inner)

    def constant(self, test) -> bool | None:
        """What a condition is as long as what was read is as it is, where that can be told."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return False if False in map(self.constant, test.values) else None
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self.constant(test.operand)
            return None if value is None else not value
        path = path_of(test)
        if path is None or len(path) != 2 or path[0] != self.itself:
            return None
        value = self.reader.found.own.get(path[1])
        return value if isinstance(value, bool) else None

    def store(self, target, value) -> None:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(part, ast.Name):
                self.refuse(part)
            if value is not None and not isinstance(value, ast.Call) and self.holds(value):
                self.held.add(part.id)
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name | ast.Attribute):
                name = value.func.id if isinstance(value.func, ast.Name) else value.func.attr
                if name in BUILTINS | {"items", "values"} and self.holds(value):
                    self.held.add(part.id)

    def holds(self, value) -> bool:
        names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
        return self.itself in names or bool(names & self.held)

    def expression(self, node) -> None:
        if not isinstance(node, _EXPRESSIONS):
            self.refuse(node)
        if isinstance(node, ast.Compare) and any(isinstance(o, ast.Is | ast.IsNot) for o in node.ops):
            if not all(isinstance(right, ast.Constant) for right in node.comparators):
                self.refuse(node)
        if isinstance(node, ast.Name):
            if node.id == self.itself:
                self.refuse(node)
            if node.id not in self.locals:
                self.outside(node)
        elif isinstance(node, ast.Attribute):
            self.attribute(node)
        elif isinstance(node, ast.Call):
            self.call(node)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.expression(child)

    def call(self, node) -> None:
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.expression(value)
        function = node.func
        if isinstance(function, ast.Name) and function.id not in self.locals:
            if function.id in BUILTINS and function.id not in self.globals:
                return
            self.outside(function)
        elif isinstance(function, ast.Attribute):
            self.attribute(function, called=True)
        else:
            self.expression(function)

    def attribute(self, node, called=False) -> None:
        path = path_of(node)
        if path is None or (path[0] != self.itself and path[0] in self.locals):
            root = node.value
            if path is not None and path[0] in self.held:
                self.refuse(node)
            self.expression(root)
        elif path[0] == self.itself:
            self.of_module(path[1:], called, node)
        else:
            self.outside(node)

    def of_module(self, path, called, node) -> None:
        """self.name, self.name.values(), or a method of self."""
        reader, name = self.reader, path[0]
        module, own = reader.module, vars(reader.module)
        if name in module._modules or name in module._parameters or name in module._buffers:
            child = module._modules.get(name)
            if len(path) == 1 or child is None:
                if len(path) > 1 and name in module._modules:
                    self.refuse(node)
                return
            container = isinstance(child, CONTAINERS) and len(path) == 2 and called
            if not container or path[1] not in ("items", "values", "keys"):
                self.refuse(node)
        elif len(path) > 1:
            self.refuse(node)
        elif name in own:
            self.value(own[name], node)
            reader.found.own[name] = own[name]
        else:
            value = inspect.getattr_static(reader.cls, name, None)
            if called:
                reader.method(name)
            else:
                self.value(value, node)
                reader.found.own[name] = ABSENT
                reader.found.of_class[name] = value

    def value(self, value, node) -> None:
        inner = value if type(value) in (tuple, torch.Size) else (value,)
        functions = FUNCTIONS if len(inner) == 1 and callable(value) else ()
        if not all(type(each) in NUMBERS or each in functions for each in inner):
            self.refuse(node)

    def outside(self, node) -> None:
        """A name of the function's module: a function of torch, a number, or what is proven too."""
        path = path_of(node)
        names, name = self.globals, path[0]
        if name not in names:
            self.refuse(node)
        value = names[name]
        for part in path[1:]:
            if not isinstance(value, types.ModuleType):
                self.refuse(node)
            value = getattr(value, part, None)
        self.reader.found.of_globals.append((names, name, names[name]))
        if type(value) in NUMBERS or (callable(value) and value in FUNCTIONS):
            return
        if value in (torch.jit.is_scripting, Tensor):
            return
        if not isinstance(value, types.FunctionType) or value.__module__.split(".")[0] == "torch":
            self.refuse(node)
        self.reader.function(value)

    def refuse(self, node):
        raise Unproven(f"its {self.tree.name} has `{ast.unparse(node).splitlines()[0][:60]}`")


def path_of(node) -> list[str] | None:
    """a.b.c as its names."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    return [node.id, *reversed(path)] if isinstance(node, ast.Name) else None
