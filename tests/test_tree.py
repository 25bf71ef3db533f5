"""Holds the house to its rules: files stay short, and every op stands in every folder under one name."""

import importlib
import pkgutil
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from lspm_kernels import compiled, ops

ROOT = Path(__file__).parents[1]
OPS = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))

# The first pattern that matches a file gives its limit in lines; * crosses folders.
LIMITS = {
    "lspm_kernels/reference/*.py": 40,
    "lspm_kernels/dispatch.py": 150,
    "lspm_kernels/ops/*.py": 250,
    "lspm_kernels/triton/*.py": 400,
    "lspm_kernels/*.py": 250,
    "csrc/cpu/*": 500,
    "csrc/cuda/*": 600,
    "csrc/bindings*.cpp": 250,
    "csrc/tensor_view.h": 250,
    "csrc/*.h": 60,
    "benchmarks/bench_*.py": 80,
    "benchmarks/*.py": 300,
    "examples/*.py": 120,
    "setup.py": 150,
    "python/lspm_models/*.py": 300,
    "python/*.py": 80,
    "tests/cuda_on_cpu/*": 600,
    "tests/amx_on_cpu/*": 150,
    "tests/*.py": 300,
}
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def tracked():
    """Files that git knows, or in an unpacked archive all files."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0:
        return [Path(line) for line in git.stdout.splitlines() if (ROOT / line).is_file()]
    return [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]


def limit_of(path):
    return next((limit for pattern, limit in LIMITS.items() if fnmatch(str(path), pattern)), None)


def lines(path):
    return (ROOT / path).read_text().count("\n")


def test_no_file_outgrows_its_limit():
    too_long = {
        str(path): (lines(path), limit_of(path))
        for path in tracked()
        if path.suffix in SOURCES and limit_of(path) is not None and lines(path) > limit_of(path)
    }
    assert not too_long


def test_every_source_has_a_limit():
    assert not [str(path) for path in tracked() if path.suffix in SOURCES and limit_of(path) is None]


def module_of(op):
    return importlib.import_module(f"lspm_kernels.ops.{op}")


def table_of(op):
    return module_of(op).BACKENDS


def kernels_of(op, row):
    """What a row's kernels are called: an op that works in place has one, and one without gradient too."""
    if op.endswith("_update"):  # its functions are called after optimizers
        return (op,)
    if hasattr(module_of(op), f"{op}_"):
        return (f"{op}_update",)
    return (f"{op}_forward", f"{op}_backward") if row.backward else (f"{op}_forward",)


def owner(op):
    """The op whose table and kernels this op has: itself, or the first that has the same."""
    return next(other for other in OPS if table_of(other) is table_of(op))


@pytest.mark.parametrize("op", OPS)
def test_an_op_stands_in_every_folder(op):
    kernels = (f"csrc/{op}.h", f"csrc/cpu/{op}.cpp") if owner(op) == op else ()
    for path in (
        f"lspm_kernels/reference/{op}.py",
        *kernels,
        f"tests/ops/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("op", sorted({owner(op) for op in OPS}))
def test_every_row_of_a_table_has_its_kernel(op):
    table = table_of(op)
    files = {
        "cpu": f"csrc/cpu/{op}.cpp",
        "cuda": f"csrc/cuda/{op}.cu",
        "triton": f"lspm_kernels/triton/{op}.py",
    }
    modules = {"cpu": compiled.cpu, "cuda": compiled.cuda}
    for row in table:
        assert (ROOT / files[row.name]).is_file()
        for kernel in kernels_of(op, row):
            if modules.get(row.name) is not None:
                assert hasattr(modules[row.name], kernel), f"{row.name} lacks {kernel}"
    for name, path in files.items():
        assert (ROOT / path).is_file() == (name in {row.name for row in table}), f"{path} without its row"


def stated_in(stub):
    """The functions of a stub, and their arguments as it has them."""
    return dict(re.findall(r"^def (\w+)\((.*?)\) -> (?:None|int): \.\.\.$", stub, re.M | re.S))


@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_the_stub_names_what_the_module_has(module):
    compiled_module = getattr(compiled, module)
    if compiled_module is None:
        pytest.skip("the CUDA module was not built")
    stub = (ROOT / "lspm_kernels" / "_C.pyi").read_text()
    stated = stated_in(stub)
    if module == "cuda":  # its stub names those of the CPU module's functions that it has, and has its own
        stub = (ROOT / "lspm_kernels" / "_C_cuda.pyi").read_text()
        imported = re.findall(r"import (\w+) as \1$", stub, re.M)
        stated = {name: stated[name] for name in imported} | stated_in(stub)
    built = {name for name in dir(compiled_module) if callable(getattr(compiled_module, name))}
    assert set(stated) == {name for name in built if not name.startswith("_")}
    for name, arguments in stated.items():
        signature = getattr(compiled_module, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+):", arguments) == re.findall(r"(\w+):", signature), name


def test_arrows_point_one_way():
    """ops rests on dispatch, compiled, triton and reference, none of them on ops; python/ rests on all."""
    below = [
        "dispatch.py",
        "compiled.py",
        "operator.py",
        "checks.py",
        "attention_checks.py",
        "attention_limits.py",
        "batch_norm.py",
        "conv2d_checks.py",
        "conv2d_scratch.py",
        "csr_checks.py",
        "embedding_bag_checks.py",
        "embedding_checks.py",
        "linear_cross_entropy_blocks.py",
        "linear_cross_entropy_checks.py",
        "mf_als_grams.py",
        "sorted_bags.py",
        "split_kv.py",
        "top_k_parts.py",
        "triton",
        "reference",
    ]
    for name in below:
        for path in [ROOT / "lspm_kernels" / name, *(ROOT / "lspm_kernels" / name).glob("*.py")]:
            if path.is_file():
                assert not re.search(r"lspm_kernels(\.| import .*)\bops\b", path.read_text()), path
    for path in (ROOT / "lspm_kernels").rglob("*.py"):
        assert "lspm_models" not in path.read_text(), path
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in SOURCES:
            assert not re.search(r"#include <(torch|ATen|c10)/", path.read_text()), path


def test_only_simd_has_intrinsics():
    for path in (ROOT / "csrc" / "cpu").iterdir():
        if path.name not in ("simd.h", "gemm_bf16.h"):
            assert not re.search(r"\b_(mm\d*|tile)_\w+\(", path.read_text()), path
