"""Runs the tests of the ops on CPU kernels built with AddressSanitizer, which watches every load and store.

    python tests/asan.py [instruction set ...]           all that this machine has where none is named

Every tensor and every scratch array of a kernel has its own red zones: PyTorch takes memory by
posix_memalign, which the sanitizer replaces. It does not see what AMX instructions touch: in place of that
build there are the tests over the model of the tiles, which is built with the sanitizer too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "asan"
LIBRARIES = ("libasan.so", "libubsan.so")  # the second brings libstdc++, whose exceptions the first wraps
OTHERS = ("--ignore-glob=*_cuda.py", "--ignore-glob=*_triton.py")  # they run no kernel of the CPU module


def environment():
    """os.environ for a Python with AddressSanitizer loaded before all else, as it must be."""
    find = [["g++", f"-print-file-name={name}"] for name in LIBRARIES]
    paths = [subprocess.run(f, capture_output=True, text=True, check=True).stdout.strip() for f in find]
    return os.environ | {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}


def available():
    """The instruction sets that this machine has, the best first."""
    from lspm_kernels.compiled import NEEDS, cpu_flags

    return [isa for isa, needs in NEEDS.items() if needs <= cpu_flags() and isa != "amx"]


def build(isas):
    """Makes a copy of the package with the sanitizer in its kernels."""
    shutil.rmtree(BUILD / "lib", ignore_errors=True)
    names = ",".join(dict.fromkeys([available()[0], *isas]))  # some tests compare with the best
    settings = {"LSPM_SANITIZE": "address", "LSPM_CUDA": "0", "LSPM_ISAS": names}
    command = ["setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | settings, check=True)


def run(isa, output=None):
    """Runs the tests on what build() made; returns their exit code.

    Args:
        output: a file that takes what they and the sanitizer say; None leaves it on the terminal.
    """
    settings = {"LSPM_SANITIZE": "address", "LSPM_ISA": isa, "PYTHONPATH": str(BUILD / "lib")}
    # -P: the package in this folder would come before the copy; --capture: pytest would keep the report.
    command = ["-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *OTHERS, "tests/ops"]
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment() | settings,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        check=False,
    ).returncode


def main(wanted):
    isas = wanted or available()
    build(isas)
    failed = []
    for isa in isas:
        print(f"{isa}:", flush=True)
        if run(isa):
            failed.append(isa)
    print("asan:", f"failed under {', '.join(failed)}" if failed else "passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
