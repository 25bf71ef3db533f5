"""What every benchmark file is: a script that prints one table, and tests that pytest-benchmark runs."""

import argparse
import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import machine
import pytest
import results
import tables
import torch

import harness


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark script has."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--smoke", action="store_true", help="tiny shapes, one round: is it right?")
    arguments.add_argument("--json", type=Path, metavar="PATH", help="put the rows into this result file")
    arguments.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help="only these cases")
    arguments.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes longest"
    )
    arguments.add_argument("--device", choices=("cpu", "cuda"), default=_device())
    return arguments


def main(
    benchmark: str,
    description: str,
    cases: Callable[[bool], Iterable],
    measure: Callable[..., list[dict]] = harness.measure,
    gpu_cases: Callable[[], Iterable] | None = None,
) -> int:
    """Measures cases(smoke), prints the table, and returns the exit status: 1 where a kernel is wrong.

    gpu_cases() are what is measured on a GPU instead: of its size.
    """
    options = parser(description).parse_args()
    on_gpu = gpu_cases is not None and options.device == "cuda" and not options.smoke
    known = gpu_cases() if on_gpu else cases(options.smoke)
    if options.no_compile:
        known = (dataclasses.replace(c, compiled=False) if hasattr(c, "compiled") else c for c in known)
    chosen = [c for c in known if any(fnmatch.fnmatchcase(str(c), p) for p in options.cases)]
    if not chosen:
        patterns = " ".join(options.cases)
        print(f"bench_{benchmark}.py: --cases must match a case, got {patterns}", file=sys.stderr)
        return 2
    machine.keep_freed_memory()
    about = {"benchmark": benchmark} | machine.description(options.device)
    rows, smoke = [], " --smoke" if options.smoke else ""
    for case in chosen:
        if sys.stderr.isatty():
            print(f"{case} ...", file=sys.stderr)
        again = {"command": f"python benchmarks/bench_{benchmark}.py --cases '{case}'{smoke}"}
        try:
            rows += [row | about | again for row in measure(case, options.device, options.smoke)]
        except harness.WrongError as wrong:
            rows.append({"case": str(case), "variant": "lspm", "wrong": str(wrong)} | about | again)
        if options.json:  # at once: who is interrupted keeps what was measured
            results.save(options.json, rows)
    print(tables.table(rows))
    return 1 if any("wrong" in row for row in rows) else 0


def pairs(cases: Iterable[harness.Case]) -> list:
    """Every case with every variant of it that this machine runs, as parameters of a test."""
    return [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in cases
        for name in (*case.kernels(_device()), *case.baselines)
    ]


def run(benchmark, case: harness.Case, variant: str) -> None:
    """Checks one variant of a case and times it by pytest-benchmark."""
    machine.keep_freed_memory()
    workload = _workload(case, _device())
    function = (case.kernels(_device()) | case.baselines)[variant]
    workload.check(variant, function)
    benchmark.group = str(case)
    benchmark(workload.turn(function), 1)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


_workload = functools.lru_cache(maxsize=1)(harness.Workload)  # the variants of a case share its inputs
