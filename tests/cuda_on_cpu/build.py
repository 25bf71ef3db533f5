"""Compiles kernels for the CPU, on demand, into a cache keyed by the content of everything that goes in.

Flavours of a kernel library:
    fast      g++, NaN-poisoned memory, red zones, adversarial schedules
    check     and every load and store checked: bounds, initialisation, alignment, races
    ptxcheck  the checks of `check` on nvcc's own PTX, inline assembly included, translated to C++
    asan      AddressSanitizer and UBSan: local arrays, shifts, host code
"""

import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_cache import made
from cuda_on_cpu import ptx2cpp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("LSPM_TEST_CACHE", ROOT / "build" / "cuda_on_cpu"))
INCLUDES = (HERE / "entries", HERE / "runtime", ROOT / "csrc" / "cuda", ROOT / "csrc")
FLAVOURS = ("fast", "check", "ptxcheck", "asan")
PTX_ARCHITECTURE = "sm_80"

COMMON = ["-std=c++17", "-g1", "-march=x86-64-v3", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing"]
COMMON += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
# GCC puts a call around every load and store; the runtime has these functions, libtsan is never linked.
HOOKS = ["-fno-tree-vectorize", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
POISON = ["-ftrivial-auto-var-init=pattern"]  # uninitialised locals become visible, as large values
KERNEL_OPTIONS = {
    "fast": ["-O1", *POISON],
    "check": ["-O1", *HOOKS, *POISON],
    "ptxcheck": ["-O1"],  # of g++ only the host code runs
    "asan": ["-O0", *SANITIZERS],
}
TRANSLATED_OPTIONS = ["-w", "-ffp-contract=off"]


class BuildError(RuntimeError):
    """A compiler refused; the message is its own."""


def digest(*parts):
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:20]


@functools.cache
def headers():
    """The text of all that a source may include."""
    files = [f for folder in INCLUDES for pattern in ("*.h", "*.cuh") for f in sorted(folder.glob(pattern))]
    return "\0".join(f.read_text() for f in files)


def cached(key, suffix, command):
    """The file that the compiler writes which `command(path)` runs."""

    def run(unfinished):
        words = [str(word) for word in command(unfinished)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(result.stderr[-4000:])

    return made(CACHE / (key + suffix), run)


def compiled(source, options):
    """The object file of a C++ source."""
    options = [*COMMON, *options, *(f"-I{folder}" for folder in INCLUDES)]
    key = digest(source.read_text(), headers(), [o for o in options if not o.startswith("-I")])
    return cached(key, ".o", lambda out: ["g++", *options, "-x", "c++", "-c", source, "-o", out])


def ptx_of(source):
    """nvcc's PTX of a kernel file, with source lines."""
    options = ["-std=c++17", "-O3", f"-arch={PTX_ARCHITECTURE}", "-lineinfo"]
    options += [f"-I{folder}" for folder in INCLUDES if folder != HERE / "runtime"]
    key = digest("ptx", source.read_text(), headers(), PTX_ARCHITECTURE)
    return cached(
        key, ".ptx", lambda out: [shutil.which("nvcc"), *options, "-ptx", "-o", out, source]
    ).read_text()


def translated(ptx, options, export=False, only=""):
    """The object file of PTX text."""
    text = ptx2cpp.translate(ptx, export, only)
    source = made(CACHE / f"{digest(text)}.cpp", lambda unfinished: unfinished.write_text(text))
    options = [*TRANSLATED_OPTIONS, *options]
    return compiled(source, [f"-I{precompiled('translated_ptx.h', options)}", *options])


def precompiled(header, options):
    """The folder of a header that g++ need not parse again, which is most of what a small kernel takes."""
    options = [*COMMON, *options, *(f"-I{folder}" for folder in INCLUDES)]
    source = HERE / "runtime" / header
    folder = CACHE / digest(header, headers(), *options)
    name = f"{folder.name}/{header}"
    cached(name, ".gch", lambda out: ["g++", *options, "-x", "c++-header", "-c", source, "-o", out])
    return folder


def runtime(flavour):
    """The machinery as a shared library: one for each flavour, so that several live in one process."""
    options = ["-O1", "-DEMU_ASAN", *SANITIZERS] if flavour == "asan" else ["-O2"]
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compiled(source, options), sources))
    options = SANITIZERS if flavour == "asan" else []
    return cached(
        digest(flavour, *(o.name for o in objects)),
        f".{flavour}.so",
        lambda out: ["g++", "-shared", *options, *objects, "-ldl", "-o", out],
    )


def linked(objects, flavour):
    """A shared library over the runtime of its flavour."""
    machinery = runtime(flavour)
    options = SANITIZERS if flavour == "asan" else []
    return cached(
        digest(machinery.name, *(o.name for o in objects)),
        ".so",
        lambda out: ["g++", "-shared", *options, *objects, machinery, "-o", out],
    )


def translated_kernels(source, only):
    """The object file of the kernels of a file that nvcc's PTX has under names like `only`."""
    return translated(ptx_of(source), ["-O1", *HOOKS], only=only)


def kernels(sources, flavour, ptx_kernels=""):
    """The library of kernel files (.cu) and of C entries to them (.cpp).

    ptx_kernels: a regular expression that the mangled names of the kernels to translate match, in ptxcheck.
    """
    tasks = []
    for source in map(Path, sources):
        is_kernel = source.suffix == ".cu"
        options = KERNEL_OPTIONS[flavour if is_kernel or flavour == "asan" else "ptxcheck"]
        tasks.append(functools.partial(compiled, source, options))
        if is_kernel and flavour == "ptxcheck":
            tasks.append(functools.partial(translated_kernels, source, ptx_kernels))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda task: task(), tasks))
    return linked(objects, flavour)


def exported(ptx, flavour="check", optimise="-O1"):
    """A library with a function ptx_NAME and its block size ptx_NAME_threads for each kernel of PTX text."""
    hooks = HOOKS if flavour == "check" else []
    return linked([translated(ptx, [optimise, *hooks], export=True)], flavour)
