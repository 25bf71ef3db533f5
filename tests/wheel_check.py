"""Builds the sdist, from it one wheel, and runs the tests of the ops on that wheel under two torch versions.

The wheel is installed beside the torch of the running Python, and in a new environment with the oldest torch
that pyproject.toml admits. Run by `make wheel-check`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = "torch==2.13.0"
NEEDED = ["numpy", "pytest", "pytest-benchmark", "hypothesis"]
TESTS = ["tests/ops/test_layer_norm.py", "tests/ops/test_operator.py", "tests/ops/test_attention.py"]
PROBE = "import torch, lspm_kernels.compiled as c; print('torch', torch.__version__, 'runs', c.cpu.__file__)"


def run(*command, **options):
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def check(python, packages, folder):
    """The tests on the wheel in `packages`, from a folder in which there is no source tree."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_WAIT_POLICY": "passive"}
    run(python, "-c", PROBE, cwd=folder, env=environment)
    run(python, "-m", "pytest", "-q", *TESTS, cwd=folder, env=environment)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
        (wheel,) = (folder / "dist").glob("*.whl")
        packages = folder / "packages"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        check(sys.executable, packages, folder)

        venv.create(folder / "oldest", with_pip=True)
        python = folder / "oldest" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", OLDEST, *NEEDED)
        check(python, packages, folder)


if __name__ == "__main__":
    main()
