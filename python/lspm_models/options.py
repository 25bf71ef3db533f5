"""The command line of the scripts: options from config classes, files below flags, errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import json
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO


def option(value: Any, text: str, /, **metadata: Any) -> Any:
    """A field of a config class that becomes an option.

    Args:
        value: what it is without the option.
        text: its help.
        metadata: choices; metavar; default, what the help shows for value.
    """
    return dataclasses.field(default=value, metadata={"help": text, **metadata})


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # a name such as chinese-poetry stays whole

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        super().add_usage(usage, actions, groups, prefix="" if prefix is None else prefix)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is a page to read and whose errors are one line and exit code 2.

    Args:
        description: what the script does.
        examples: command lines, shown at the end of the help.
        command: what stands behind the script's name, its first word part of the name in errors.
    """

    def __init__(self, description: str, examples: Sequence[str], command: str = "") -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may have what no terminal can show
            sys.stdout.reconfigure(errors="backslashreplace")
        program = Path(sys.argv[0]).name
        epilog = "examples\n" + "\n".join(f"  python python/{example}" for example in examples)
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
            prog=" ".join([program, *command.split()[:1]]),
            usage=" ".join(["python", f"python/{program}", *command.split(), "[options]"]),
        )
        self.run = self.add_argument_group("run")
        self.run.add_argument("-h", "--help", action="help", help="show this page")

    def add_config(
        self, title: str, config: type, defaults: dict[str, Any] | None = None, skip: Sequence[str] = ()
    ) -> None:
        """Adds one option per field of a config class, under a title; its help shows the default."""
        group, hints = self.add_argument_group(title), typing.get_type_hints(config)
        for item in dataclasses.fields(config):
            if item.name in skip:
                continue
            default = (defaults or {}).get(item.name, item.default)
            shown = item.metadata.get("default", " ".join(default) if isinstance(default, tuple) else default)
            keywords: dict[str, Any] = {"help": f"{item.metadata['help']} [{_spelled(shown)}]"}
            kind = _kind(hints[item.name])
            if kind is bool:
                keywords["action"] = argparse.BooleanOptionalAction
            elif "choices" in item.metadata:
                keywords["choices"] = item.metadata["choices"]
            elif kind is tuple:
                keywords |= {"nargs": "+", "metavar": item.metadata.get("metavar", "TEXT")}
            else:
                metavar = item.metadata.get("metavar", {int: "N", float: "X", str: "NAME"}[kind])
                keywords |= {"type": {int: _whole, float: _number, str: str}[kind], "metavar": metavar}
            group.add_argument(f"--{item.name.replace('_', '-')}", **keywords)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")  # of --option=--, which argparse takes for a mark
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        prefix, unknown = "unrecognized arguments: ", ""
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            # Without dashes, which would make any two alike: of --data came --width.
            names = {name.lstrip("-"): name for name in self._option_string_actions}
            close = difflib.get_close_matches(unknown.lstrip("-"), names, 1)
            message = f"unknown option {unknown}" + (
                f"; did you mean {names[close[0]]}?" if close else "; see --help"
            )
        fail(self.prog, message.removeprefix("argument "))


def fail(program: str, message: str, code: int = 2) -> NoReturn:
    """Prints one line on stderr and ends the program."""
    sys.stderr.write(f"{program}: {' '.join(str(message).split())}\n")
    sys.exit(code)


def standard_input(option: str) -> TextIO:
    """What - stands for. Raises ValueError where it is closed."""
    if sys.stdin is None:
        raise ValueError(f"{option}: - stands for standard input, which must be open, got a closed one")
    return sys.stdin


@contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Turns what the user can mend, a bad value, file or installation, into one line and exit code 2.

    Too little memory, for a batch as a rule, is one line and exit code 1.
    """
    try:
        yield
    except ValueError as error:
        fail(program, str(error))
    except OSError as error:
        fail(program, f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail(program, "interrupted", code=130)
    except ModuleNotFoundError as error:
        package = f"needs the package {error.name.partition('.')[0]}"
        fail(program, f"{package}; install it, in the repository, with: pip install '.[models]'")
    except ImportError as error:  # the kernels were not built, or this machine cannot run those that were
        fail(program, str(error))
    except (MemoryError, RuntimeError) as error:
        # Of torch's, that of a GPU has a class, which is not imported for this, and that of a CPU but words.
        lacks = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not (lacks or "can't allocate memory" in str(error)):
            raise
        fail(program, f"memory must suffice for what is asked for, got too little: {error}", code=1)


def read_config(path: str | Path) -> dict[str, dict]:
    """Reads a config file, TOML or JSON by its suffix: sections with options in them.

    Raises:
        ValueError: there is no such file, or it cannot be understood.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"config: {path} must be a TOML or JSON file, got no such file") from error
    except IsADirectoryError as error:
        raise ValueError(f"config: {path} must be a TOML or JSON file, got a folder") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} must be TOML or JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} must hold sections with options, got {content!r:.60}")
    return content


def merge(sections: dict[str, type], layers: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """Merges layers of options, the later above the earlier, and checks names and types.

    Args:
        sections: the config class of each section.
        layers: section -> option -> value.

    Returns:
        Every option of every section that any layer sets.

    Raises:
        ValueError: a section or an option does not exist, or a value is of the wrong type.
    """
    merged: dict[str, dict] = {name: {} for name in sections}
    for layer in layers:
        for section, options in layer.items():
            if section not in sections:
                raise ValueError(f"config: section must be one of {', '.join(sections)}, got {section!r}")
            if not isinstance(options, dict):
                raise ValueError(f"config: {section} must be a section of options, got {options!r:.60}")
            hints = typing.get_type_hints(sections[section])
            for name, value in options.items():
                if name not in hints:
                    close = difflib.get_close_matches(name, hints, 1)
                    raise ValueError(
                        f"config: {section}.{name} must be an option, got an unknown one"
                        + (f"; did you mean {close[0]}?" if close else "")
                    )
                merged[section][name] = _checked(f"{section}.{name}", value, hints[name])
    return merged


def given(arguments: argparse.Namespace, sections: dict[str, type]) -> dict[str, dict]:
    """Returns the options that stood on the command line, by section."""
    flags = vars(arguments)
    return {
        section: {item.name: flags[item.name] for item in dataclasses.fields(config) if item.name in flags}
        for section, config in sections.items()
    }


def _kind(hint: Any) -> type:
    """Returns int for int | None, tuple for tuple[str, ...], and so on."""
    if isinstance(hint, types.UnionType):
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    return typing.get_origin(hint) or hint


def _checked(name: str, value: Any, hint: Any) -> Any:
    kind = _kind(hint)
    if value is None and isinstance(hint, types.UnionType):
        return None
    if kind is tuple and isinstance(value, (str, list, tuple)):
        return tuple(map(str, [value] if isinstance(value, str) else value))
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    spoken = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        tuple: "a list of texts",
    }
    raise ValueError(f"config: {name} must be {spoken[kind]}, got {value!r}")


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
