"""A function of Python as its own source: proven to be it, and made a function again when it was changed.

The source that lies on a disk may be another than what runs (the file was edited, a decorator wrote code). So
it is compiled as it is first: only where that gives the bytecode that the function has is it believed.
"""

import __future__

import ast
import functools
import inspect
import types
from collections.abc import Callable

from lspm_kernels.acceleration.statements import Unproven

_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
# What looks at a function's variables or its frame would see ours among them.
_LOOKS_INSIDE = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "stack"}


def unwrapped(function: Callable) -> types.FunctionType:
    """The function that decorators stand before, as functools.wraps tells.

    Raises:
        Unproven: it is none of Python's.
    """
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, types.FunctionType):
        raise Unproven(f"{function!r} is no function of Python")
    return function


def tree_of(function: types.FunctionType, *, changing: bool = True) -> ast.FunctionDef:
    """The source of a function, without its decorators, with the lines of its file.

    Raises:
        Unproven: there is no source, or it is not what runs; or it is to be changed, and would see that.
    """
    if changing and _LOOKS_INSIDE.intersection(function.__code__.co_names):
        raise Unproven(f"{function.__qualname__} looks at its own variables")
    tree = _definition(function)
    tree.decorator_list = []
    if not _same(_compiled(function, tree, ()), function.__code__):
        raise Unproven(f"{function.__qualname__} is not what its source says")
    return tree


def remade(function: Callable, tree: ast.FunctionDef, given: dict[str, Callable]) -> Callable:
    """A function like `function`, with its decorators, of a changed tree that may name what is given.

    It reads the globals and the closure that `function` reads.

    Raises:
        Unproven: a decorator does not show what it calls.
    """
    inner = unwrapped(function)
    code = _compiled(inner, tree, tuple(given))
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in given.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    return _wrapped(function, _like(inner, code, closure))


def _definition(function) -> ast.FunctionDef:
    """Its definition in its file."""
    lines, first = _source(function)
    last = _file("".join(lines))[0].get(first + 1)
    if last is None:
        raise Unproven(f"{function.__qualname__} is not found in its file")
    indented = lines[first][:1].isspace()  # kept as it is, since strings of several lines are
    outer = ast.parse("".join(["if True:\n" if indented else "", *lines[first:last]]))
    (tree,) = outer.body[0].body if indented else outer.body
    return ast.increment_lineno(tree, first - indented)


def _source(function) -> tuple[list[str], int]:
    try:
        return inspect.findsource(function)
    except (OSError, TypeError, IndexError):
        raise Unproven(f"{function.__qualname__} has no source to read") from None


@functools.lru_cache(16)
def _file(text: str) -> tuple[dict[int, int], list[str]]:
    """Of a file: the first lines of its functions with their last, and the names that it imports."""
    try:
        open_: list[ast.AST] = [ast.parse(text)]
    except SyntaxError:
        raise Unproven("its file is no source of Python") from None
    functions, imported, outermost = {}, {}, set(open_)
    while open_:
        node = open_.pop()
        inner = [
            child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)
        ]
        open_ += inner
        if isinstance(node, ast.FunctionDef):
            functions[min(part.lineno for part in (node, *node.decorator_list))] = node.end_lineno
        if isinstance(node, ast.Import | ast.ImportFrom) and node in outermost:
            names = (alias.asname or alias.name.split(".")[0] for alias in node.names)
            imported |= dict.fromkeys(name for name in names if name != "*")
        if node in outermost and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            outermost.update(inner)
    return functions, [*imported]


def _compiled(function, tree, given) -> types.CodeType:
    code = function.__code__
    outer = ast.parse("def outer(): pass")
    names = [ast.arg(name) for name in (*code.co_freevars, *given)]
    outer.body[0].args.args, outer.body[0].body = names, [_bare(tree)]
    # What is called of a module that the file imports compiles to other bytecode.
    if imported := _file("".join(_source(function)[0]))[1]:
        outer.body.append(ast.Import([ast.alias(name) for name in imported]))
    flags = code.co_flags & _FUTURE
    module = compile(ast.fix_missing_locations(outer), code.co_filename, "exec", flags, dont_inherit=True)
    (made,) = (const for const in module.co_consts if isinstance(const, types.CodeType))
    (made,) = (const for const in made.co_consts if isinstance(const, types.CodeType))
    return made.replace(co_qualname=code.co_qualname)


def _bare(tree) -> ast.FunctionDef:
    """A definition without what is computed where it stands: its defaults and annotations."""
    old, nothing = tree.args, ast.Constant(None)
    args = ast.arguments(
        posonlyargs=[ast.arg(a.arg) for a in old.posonlyargs],
        args=[ast.arg(a.arg) for a in old.args],
        vararg=old.vararg and ast.arg(old.vararg.arg),
        kwonlyargs=[ast.arg(a.arg) for a in old.kwonlyargs],
        kw_defaults=[value and nothing for value in old.kw_defaults],
        kwarg=old.kwarg and ast.arg(old.kwarg.arg),
        defaults=[nothing] * len(old.defaults),
    )
    bare = ast.FunctionDef(tree.name, args, tree.body, [], None, None)
    return ast.copy_location(bare, tree)


def _same(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two pieces of bytecode do the same, wherever they stand."""
    names = "code", "names", "varnames", "freevars", "cellvars", "name"
    counts = "argcount", "posonlyargcount", "kwonlyargcount", "exceptiontable"
    if any(getattr(one, f"co_{n}") != getattr(other, f"co_{n}") for n in (*names, *counts)):
        return False
    if (one.co_flags ^ other.co_flags) & ~inspect.CO_NESTED:
        return False
    pairs = list(zip(one.co_consts, other.co_consts, strict=False))
    return len(one.co_consts) == len(other.co_consts) and all(
        _same(a, b) if isinstance(a, types.CodeType) and isinstance(b, types.CodeType) else repr(a) == repr(b)
        for a, b in pairs
    )


def _like(function, code, closure) -> types.FunctionType:
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__doc__ = function.__kwdefaults__, function.__doc__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__annotations__ = function.__annotations__
    vars(made).update(vars(function))
    return made


def _wrapped(function, inner) -> Callable:
    """`inner` behind the decorators that stand before what is innermost in `function`."""
    if not hasattr(function, "__wrapped__"):
        return inner
    behind, cells = function.__wrapped__, getattr(function, "__closure__", None) or ()
    held = [_content(cell) is behind for cell in cells]
    if not isinstance(function, types.FunctionType) or held.count(True) != 1:
        raise Unproven(f"a decorator of {function.__qualname__} does not show what it calls")
    new = _wrapped(behind, inner)
    closure = (types.CellType(new) if is_it else cell for is_it, cell in zip(held, cells, strict=True))
    made = _like(function, function.__code__, tuple(closure))
    made.__wrapped__ = new
    return made


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None
