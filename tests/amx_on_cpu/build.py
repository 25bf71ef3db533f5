"""Builds the CPU kernels as for AMX, over the model of its tiles; the processor needs AVX-512's bfloat16."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from build_cache import made

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("LSPM_TEST_CACHE", ROOT / "build")) / "amx_on_cpu"
TILES = ROOT / "tests" / "amx_on_cpu" / "tiles.h"
SANITIZE = [f"-fsanitize={name}", "-g1"] if (name := os.environ.get("LSPM_SANITIZE")) else []
FLAGS = [
    "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-w",
    "-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-D__AMX_BF16__", "-include", str(TILES),
    *SANITIZE, f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
]  # fmt: skip


def module():
    """The module, built unless one of the same sources is there.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    csrc = ROOT / "csrc"
    bindings, kernels = sorted(csrc.glob("bindings_*.cpp")), sorted((csrc / "cpu").glob("*.cpp"))
    sources = csrc / "bindings.cpp", *bindings, *kernels
    texts = [path.read_bytes() for path in (TILES, *sources, *sorted(csrc.rglob("*.h")))]
    texts += map(str.encode, SANITIZE)
    out = CACHE / hashlib.sha256(b"\0".join(texts)).hexdigest()[:16] / "_C.so"
    made(out, lambda unfinished: _build(bindings, kernels, unfinished))
    spec = importlib.util.spec_from_file_location("_C", out)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _asks_for_tiles(source):
    text = source.read_text()
    included = re.findall('^#include "(.+)"', text, re.M)
    headers = [ROOT / "csrc" / name.removeprefix("../") for name in included]
    return "__AMX_" in text or any(map(_asks_for_tiles, headers))


def _build(bindings, kernels, out):
    commands = [["-O1", *(f"-include{path}" for path in bindings), str(ROOT / "csrc" / "bindings.cpp")]]
    # What is not tested here has only to be there: -O0 compiles it in a third of the time.
    commands += [["-O2" if _asks_for_tiles(source) else "-O0", str(source)] for source in kernels]
    objects = [out.parent / f"{Path(command[-1]).stem}.o" for command in commands]
    commands = [["g++", *FLAGS, *c, "-c", "-o", str(o)] for c, o in zip(commands, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    subprocess.run(["g++", "-shared", "-fopenmp", *SANITIZE, *map(str, objects), "-o", str(out)], check=True)
