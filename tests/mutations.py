"""Breaks kernels one way at a time and shows which tests notice: every mutation must turn red.

    python tests/mutations.py [part of a name ...]       (LSPM_CUDA_ON_CPU="fast check" limits the flavours)

An op adds its mutations to the table of its backend in tests/mutation_tables/, as rows of Mutation.
"""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS_CACHE = Path(os.environ.get("LSPM_TEST_CACHE", ROOT / "build" / "cuda_on_cpu"))
COPIED = ("csrc", "lspm_kernels", "python", "tests", "benchmarks", "pyproject.toml", "setup.py")
PATIENCE = 900  # seconds that the tests of a mutation may take
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc")


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        name: what is wrong.
        file: of the repository.
        old: the text that is replaced, its only occurrence.
        new: what takes its place.
        tests: pytest's arguments; at least one of these tests must fail.
        command: run in the copy before the tests, to build it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What the tests said about one mutation."""

    mutation: Mutation
    failed: tuple[str, ...]  # test ids
    report: str  # the first error

    @property
    def caught(self):
        return bool(self.failed)


def all_mutations():
    """Every row of every table."""
    tables = importlib.import_module("mutation_tables")
    names = [module.name for module in pkgutil.iter_modules(tables.__path__)]
    modules = [importlib.import_module(f"mutation_tables.{name}") for name in sorted(names)]
    return [mutation for module in modules for mutation in module.MUTATIONS]


def mutated(text, mutation):
    """The file's text with the bug.

    Raises:
        ValueError: the table is out of date.
    """
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"mutations: {mutation.name}: old must occur once in {mutation.file}, got {count}")
    return text.replace(mutation.old, mutation.new)


def run(mutation):
    """Runs the tests of a mutation on a copy of the repository that has it."""
    with tempfile.TemporaryDirectory() as folder:
        copy, cache = Path(folder) / "repository", Path(folder) / "cache"
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=NOT_COPIED)
            else:
                shutil.copy2(source, copy / name)
        file = copy / mutation.file
        file.write_text(mutated(file.read_text(), mutation))
        # What is built already, as links: it is keyed by content, so only what the mutation touches is made.
        TESTS_CACHE.mkdir(parents=True, exist_ok=True)
        shutil.copytree(TESTS_CACHE, cache, copy_function=os.symlink)
        environment = os.environ | {"LSPM_TEST_CACHE": str(cache), "PYTHONPATH": f"{copy}:{copy / 'python'}"}
        if mutation.command:
            subprocess.run(mutation.command, cwd=copy, env=environment, check=True, capture_output=True)
        pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
        call = {"cwd": copy, "env": environment, "capture_output": True, "text": True}
        try:
            process = subprocess.run([*pytest, *mutation.tests], check=False, timeout=PATIENCE, **call)
        except subprocess.TimeoutExpired:  # threads may wait for each other for ever
            return Result(mutation, ("a test hung",), f"no end after {PATIENCE} seconds")
    if "BuildError" in process.stdout:  # no bug, only a broken table
        raise ValueError(f"mutations: {mutation.name}: new must compile, got {process.stdout[-1000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) \S*::(.*?)(?: - .*)?$", process.stdout, re.M)
    if process.returncode not in (0, 1):  # a crash is noticed too, a table without tests is not
        failed = failed or (["the process died"] if process.returncode < 0 else [])
    error = re.search(r"^(?:E  |\S+:\d+: )(.*(?:\n(?=    threads).*)*)", process.stdout, re.M)
    return Result(mutation, tuple(failed), error[1].strip()[:300] if error else process.stdout[-300:])


def main(wanted):
    chosen = [m for m in all_mutations() if not wanted or any(word in m.name for word in wanted)]
    silent = 0
    for mutation in chosen:
        result = run(mutation)
        silent += not result.caught
        flavours = sorted({flavour for test in result.failed for flavour in re.findall(r"\[(\w+)", test)})
        print(
            f"{'caught' if result.caught else 'SILENT'}  {mutation.name}: {len(result.failed)} tests",
            *flavours,
        )
        print(f"        {result.report}", flush=True)
    print(f"{len(chosen) - silent} caught, {silent} silent")
    return silent > 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
