"""Compiles kernels for the CPU, on demand, into a cache keyed by everything that goes in."""

import functools
import glob
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from cuda_on_cpu import ptx2cpp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_on_cpu"
INCLUDES = (HERE / "runtime", ROOT / "csrc", ROOT / "csrc" / "cuda")

COMMON = ["-std=c++17", "-g", "-march=x86-64-v3", "-fPIC", "-fno-gnu-unique", "-DEMU_SERIAL"]
# GCC's thread sanitizer calls a hook at every load and store; the runtime has its own hooks, libtsan is never linked.
HOOKS = ["-fno-tree-vectorize", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildError(RuntimeError):
    """A compiler refused; the message is its own."""


def digest(*parts):
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:20]


@functools.cache
def headers():
    """The text of every header and runtime source: part of each key."""
    files = sorted(f for d in INCLUDES for p in ("*.h", "*.cuh") for f in glob.glob(f"{d}/{p}"))
    return "\0".join(Path(f).read_text() for f in files)


def cached(key, suffix, command):
    """Path of the file that `command(path)` makes, made once; safe with several processes."""
    path = CACHE / (key + suffix)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = CACHE / f"{key}.{os.getpid()}{suffix}"
        result = subprocess.run([str(c) for c in command(unfinished)], capture_output=True, text=True)
        if result.returncode:
            raise BuildError(result.stderr[-4000:])
        os.replace(unfinished, path)
    return path


def compile_cpp(source, options):
    """An object file of a C++ source."""
    options = [*COMMON, *options]
    key = digest(Path(source).read_text(), headers(), options, shutil.which("g++"))
    includes = [f"-I{d}" for d in INCLUDES]
    return cached(key, ".o", lambda out: ["g++", *options, *includes, "-x", "c++", "-c", source, "-o", out])


def runtime(flavour):
    """The machinery as a shared library: one for each flavour, so that several live in one process."""
    options = ["-O1", "-DEMU_ASAN", *SANITIZERS] if flavour == "asan" else ["-O2"]
    objects = [compile_cpp(f, options) for f in sorted(glob.glob(f"{HERE}/runtime/*.cpp"))]
    key = digest(flavour, *objects)
    return cached(key, f".{flavour}.so", lambda out: ["g++", "-shared", *objects, "-ldl", "-o", out, *(SANITIZERS if flavour == "asan" else [])])


def exported(ptx, flavour="check", optimise="-O1"):
    """A shared library with a C function ptx_NAME, and its thread count ptx_NAME_threads, for each kernel of PTX text."""
    text = ptx2cpp.translate(ptx, export=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / (digest(text) + ".cpp")
    source.write_text(text)
    hooks = HOOKS if flavour == "check" else []
    return link([compile_cpp(source, [optimise, "-w", "-ffp-contract=off", *hooks])], flavour)


def link(objects, flavour):
    machinery = runtime(flavour)
    key = digest(machinery, *objects)
    options = SANITIZERS if flavour == "asan" else []
    return cached(key, ".so", lambda out: ["g++", "-shared", *options, *objects, machinery, f"-Wl,-rpath,{CACHE}", "-o", out])
