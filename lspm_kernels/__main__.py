"""What lspm_kernels has: `info` on this machine, `backends` in the tables of its ops, `bench` on a model."""

import argparse
import importlib
import pkgutil
import signal
import sys
from importlib import metadata
from typing import NoReturn

import torch

from lspm_kernels import bench, compiled, ops
from lspm_kernels.dispatch import dtype_name


def info() -> str:
    """What `python -m lspm_kernels info` prints."""
    lines = [f"lspm_kernels {_version()}, torch {torch.__version__}, {_triton()}"]
    lines += ["", "CPU kernels"]
    for isa in reversed(compiled.NEEDS):
        try:
            compiled.load_cpu(isa)
            state = "in use" if isa == compiled.cpu.isa else "available; LSPM_ISA=" + isa + " takes it"
        except ImportError as error:
            state = "not available: " + str(error).removeprefix(f"lspm_kernels: {isa} ")
        lines.append(f"  {isa:12s}{state}")
    lines.append(f"  threads     {torch.get_num_threads()}, as torch.set_num_threads says")
    lines += ["", "Backends of each op, the first that admits a call runs it"]
    width = max(map(len, _tables())) + 2
    for op, rows in _tables().items():
        for row in rows:
            reason = row.missing()
            state = f"not available: it needs {reason}" if reason else "available"
            lines.append(f"  {op:{width}s}{row.name:10s}{state}")
        lines.append(f"  {op:{width}s}{'reference':10s}plain PyTorch, for what no row above admits")
    return "\n".join(lines)


def backends() -> str:
    """What `python -m lspm_kernels backends` prints: what each backend of each op takes, in Markdown."""
    lines = ["| op | backend | device | dtypes | needs besides | else |", "|---|---|---|---|---|---|"]
    for op, rows in _tables().items():
        for place, row in enumerate(rows, 1):
            dtypes = ", ".join(map(dtype_name, row.dtypes))
            limits = "; ".join(limit.needs for limit in row.limits) or "nothing"
            others = [other.name for other in rows[place:] if other.device == row.device]
            cells = op, row.name, row.device, dtypes, limits, ", then ".join([*others, "plain PyTorch"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tables() -> dict[str, tuple]:
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    return {name: importlib.import_module(f"lspm_kernels.ops.{name}").BACKENDS for name in names}


def _version() -> str:
    try:
        return metadata.version("lspm-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _triton() -> str:
    try:
        import triton  # its distribution has other names too: triton-rocm, triton-xpu
    except ImportError:
        return "no triton"
    return f"triton {triton.__version__}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}; see --help\n")


def main(arguments: list[str] | None = None) -> int | None:
    """Runs the command that arguments, or the command line, say; returns its exit code."""
    parser = _Parser(prog="python -m lspm_kernels", description="What lspm_kernels has here.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "info", help="what was built, what this machine has, why a backend is refused"
    )
    command.set_defaults(run=lambda _: print(info()))
    command = commands.add_parser("backends", help="what each backend of each op takes, and what else runs")
    command.set_defaults(run=lambda _: print(backends()))
    command = commands.add_parser("bench", help="times a model before and after lspm_kernels.accelerate")
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
