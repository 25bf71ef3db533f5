"""Where the tree of a forward calls attention or a rotation, or normalises a sum; and the change there."""

import ast
import types

from lspm_kernels.acceleration import attentions, rotations
from lspm_kernels.acceleration.statements import path_of

_SCOPES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
)  # fmt: skip


class Places(ast.NodeTransformer):
    """Finds them, and changes the tree.

    Args:
        function: what the tree is of.
        norms: paths below the module of what may be taken for a norm; None: all.

    Attributes:
        said: which ops are called in place of a function.
        norms: the paths of modules that are called for a sum, whatever they are.
        refused: what is said of a function that looks like a rotation and is none that is known, or None.
    """

    def __init__(self, function: types.FunctionType, tree: ast.FunctionDef, norms=None) -> None:
        self.globals, self.tree, self.wanted = function.__globals__, tree, norms
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.locals = {*function.__code__.co_varnames, *function.__code__.co_cellvars}
        self.locals |= {*function.__code__.co_freevars}
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.itself = arguments[0].arg if arguments and arguments[0].arg not in stored else None
        self.said: dict[str, None] = {}
        self.norms: dict[tuple[str, ...], None] = {}
        self.refused: str | None = None
        self.sums = 0

    def change(self) -> None:
        """Changes the tree where it stands."""
        self._block(self.tree.body)

    def generic_visit(self, node):
        if isinstance(node, _SCOPES):
            return node
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                self._sums(block)
        return super().generic_visit(node)

    def _block(self, statements):
        self._sums(statements)
        statements[:] = [self.visit(statement) for statement in statements]

    def visit_Call(self, node):
        self.generic_visit(node)
        function = self._resolved(node.func)
        if function is attentions.TORCHS:
            self.said["scaled_dot_product_attention"] = None
            return _call("_lspm_attend", [node.func, *node.args], node.keywords, node)
        options = _options(node) if len(node.args) == 4 else None
        if options is not None and rotations.is_suspected(function):
            if rotations.known(function, options) is None:
                self.refused = f"{function.__name__} is no rotary embedding that is known"
                return node
            self.said["rotary"] = None
            return _call("_lspm_rotate", [node.func, *node.args], node.keywords, node)
        total = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if isinstance(total, ast.BinOp) and isinstance(total.op, ast.Add) and self._is_norm(node.func):
            return _call("_lspm_norm_of_sum", [node.func, total.left, total.right], [], node)
        return node

    def _resolved(self, node):
        """What a name stands for that is none of the function's own."""
        path = path_of(node)
        if path is None or path[0] in self.locals or path[0] not in self.globals:
            return None
        value = self.globals[path[0]]
        for part in path[1:]:
            value = getattr(value, part, None) if isinstance(value, types.ModuleType) else None
        return value

    def _is_norm(self, node) -> bool:
        path = path_of(node)
        if path is None or self.itself is None or path[0] != self.itself or len(path) == 1:
            return False
        below = tuple(path[1:])
        if self.wanted is not None and below not in self.wanted:
            return False
        self.norms[below] = None
        return True

    def _sums(self, statements: list) -> None:
        """`a = x + y`, and after it a statement that first of all calls self.norm(a)."""
        for place in reversed(range(len(statements))):  # what follows a place may grow
            found = self._follower(statements, place)
            if found is not None:
                last, call, tests = found
                name = f"_lspm_normed_{self.sums}"
                self.sums += 1
                statements[place] = _sum(statements[place], name, call.func, tests)
                statements[last] = _Exchange(call, name).visit(statements[last])
                if not isinstance(statements[last], ast.Return):
                    statements.insert(last + 1, _forget(name, statements[last]))

    def _follower(self, statements, place):
        """The place of the norm of a place's sum, its call, and what must be false until then."""
        total = statements[place]
        if not isinstance(total, ast.Assign) or len(total.targets) != 1:
            return None
        (target,), value = total.targets, total.value
        if not (
            isinstance(target, ast.Name) and isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)
        ):
            return None
        tests, copied = [], {target.id}
        for last, statement in enumerate(statements[place + 1 :], place + 1):
            call = _first(statement)
            if call is not None and _is_of(call, target.id) and self._is_norm(call.func):
                return last, call, tests
            if isinstance(statement, ast.If) and not statement.orelse and _asks_for_none(statement.test):
                if statement.test.left.id in copied:
                    return None
                tests.append(statement.test)
            elif _is_copy(statement) and statement.targets[0].id != target.id:
                copied.add(statement.targets[0].id)
            else:
                return None
        return None


class _Exchange(ast.NodeTransformer):
    """Puts `call if name is None else name` in place of one call."""

    def __init__(self, call, name):
        self.call, self.name = call, name

    def visit(self, node):
        if node is not self.call:
            return super().generic_visit(node)
        test = ast.Compare(ast.Name(self.name, ast.Load()), [ast.Is()], [ast.Constant(None)])
        return _placed(ast.IfExp(test, node, ast.Name(self.name, ast.Load())), node)


def _sum(statement, name, norm, tests):
    """`a, name = sum_and_norm(norm, x, y)`, without the norm where one of the tests is true."""
    for test in tests:
        norm = ast.IfExp(test, ast.Constant(None), norm)
    value = statement.value
    call = _call("_lspm_sum_and_norm", [norm, value.left, value.right], [], value)
    target = ast.Tuple([statement.targets[0], ast.Name(name, ast.Store())], ast.Store())
    return _placed(ast.Assign([target], call), statement)


def _forget(name, statement):
    return _placed(ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)), statement)


def _call(name, args, keywords, node):
    return _placed(ast.Call(ast.Name(name, ast.Load()), args, keywords), node)


def _placed(new, old):
    return ast.fix_missing_locations(ast.copy_location(new, old))


def _first(statement):
    """The call that a statement makes before it does anything else, or None."""
    simple = isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr)
    return next(_done(statement.value), None) if simple and statement.value is not None else None


def _done(node):
    """What an expression does, in its order: calls, and None for all else that may have an effect."""
    if isinstance(node, ast.Call):
        yield from _done(node.func)
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from _done(value)
        yield node
    elif isinstance(node, ast.BinOp):
        yield from _done(node.left)
        yield from _done(node.right)
        yield None
    elif path_of(node) is None and not isinstance(node, ast.Constant):
        yield None


def _options(call) -> dict | None:
    """What a call names of its arguments, where these are constants."""
    if not all(k.arg is not None and isinstance(k.value, ast.Constant) for k in call.keywords):
        return None
    return {keyword.arg: keyword.value.value for keyword in call.keywords}


def _is_of(call, name) -> bool:
    plain = len(call.args) == 1 and not call.keywords
    return plain and isinstance(call.args[0], ast.Name) and call.args[0].id == name


def _asks_for_none(test) -> bool:
    """`name is None`, or `is not`."""
    if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Name) or len(test.ops) != 1:
        return False
    (right,) = test.comparators
    return (
        isinstance(test.ops[0], ast.Is | ast.IsNot)
        and isinstance(right, ast.Constant)
        and right.value is None
    )


def _is_copy(statement) -> bool:
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Name)
    )
