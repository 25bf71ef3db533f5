"""Signatures and docstrings as Markdown, from the source: nothing is imported, so pages need no torch."""

import ast
import inspect
import re
from pathlib import Path

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Source):(.*)")
NAMED = re.compile(r"\(?\w+(, \w+)*\)?: ")
WIDTH = 100


def shown(name: str, root: Path) -> str:
    """A function or a class, `package.module.name`, with a heading.

    Raises:
        ValueError: there is none.
    """
    module, _, wanted = name.rpartition(".")
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text()).body if path.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == wanted:
            code = f"```python\n{_signature(node)}\n```"
            return f"## `{wanted}`\n\n{code}\n\n{_markdown(ast.get_docstring(node) or '')}"
    raise ValueError(f"docstrings: name must be a function or a class of a module, got {name!r}")


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    function = node
    if isinstance(node, ast.ClassDef):
        own = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        if not own:
            return f"class {node.name}"
        function = own[0]
    given = function.args
    plain = given.args[1:] if function is not node else given.args
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    parts = [_argument(*pair) for pair in zip(plain, defaults, strict=True)]
    if given.kwonlyargs:
        parts += ["*", *(_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True))]
    end = f" -> {ast.unparse(function.returns)}" if function.returns and function is node else ""
    line = f"{node.name}({', '.join(parts)}){end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{node.name}(", *(f"    {part}," for part in parts), f"){end}"])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return argument.arg + kind + ("" if default is None else f" = {ast.unparse(default)}")


def _markdown(text: str) -> str:
    parts, lines = [[]], text.split("\n")
    for line in lines:
        if SECTION.fullmatch(line):
            parts.append([])
        parts[-1].append(line)
    prose = "\n".join(line if line.startswith("    ") else _escaped(line) for line in parts[0])
    return "\n\n".join([prose.strip("\n"), *map(_section, parts[1:])])


def _section(lines: list[str]) -> str:
    """A heading with a list of its items, or of what stands there in one piece with that."""
    title, rest = SECTION.fullmatch(lines[0]).groups()
    body = inspect.cleandoc("\n".join(["", *lines[1:]])).split("\n")
    if title == "Source" or (title == "Returns" and not NAMED.match(body[0])):
        return f"**{title}**: {_escaped(' '.join([rest.strip(), *map(str.strip, body)]).strip())}"
    items: list[str] = []
    for line in body:
        if line.startswith(" ") or (title == "Returns" and not NAMED.match(line)):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    pairs = (item.partition(": ") for item in items)
    items = [f"- `{names}`: {_escaped(said)}" for names, _, said in pairs]
    return "\n".join([f"**{title}**", "", *items])


def _escaped(line: str) -> str:
    """What Markdown would read as its own, outside of `code`."""
    head, line = ("* ", line[2:]) if line.startswith("* ") else ("", line)
    spans = re.split(r"(`[^`]*`)", line)
    return head + "".join(
        span if span.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", span.replace("<", "&lt;"))
        for span in spans
    )
