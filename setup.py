"""Compiles csrc/ with ninja. Needs neither torch nor a GPU.

lspm_kernels._cpu.<isa>._C are the same kernels for one instruction set each; lspm_kernels._C_cuda is built
where a suitable nvcc is found. LSPM_ISAS=avx2,avx512 builds only these; LSPM_CUDA=0 leaves CUDA out and 1
insists on it; LSPM_CUDA_ARCHS=80;90 sets the GPUs to compile for; LSPM_SANITIZE=address builds with that
sanitizer (tests/asan.py runs it); CXX, NVCC and MAX_JOBS are as ever.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX = os.environ.get("CXX") or "g++"
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
ISAS = {
    "base": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
INCLUDES = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
SANITIZE = [f"-fsanitize={name}", "-g1"] if (name := os.environ.get("LSPM_SANITIZE")) else []
COMMON = ["-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", *SANITIZE]
# GCC 12's AVX-512 headers set off these two warnings by themselves.
KERNEL = ["-O3", "-fopenmp", "-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def chosen(variable, known, usual, separator):
    names = value.split(separator.strip()) if (value := os.environ.get(variable)) else usual
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"setup: {variable} must name some of {separator.join(known)}, got {unknown[0]!r}")
    return names


def asks_for(macro, source):
    text = Path(source).read_text()
    included = re.findall('^#include "(.+)"', text, re.M)
    return macro in text or any(asks_for(macro, f"csrc/{name.removeprefix('../')}") for name in included)


def find_nvcc():
    """The nvcc to use, or None where CUDA is left out; says why where it was asked for and cannot be had."""
    wish = os.environ.get("LSPM_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"setup: LSPM_CUDA must be 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return None
    nvcc = shutil.which(name := os.environ.get("NVCC") or "nvcc")
    text = subprocess.getoutput(f"{shlex.quote(nvcc)} --version") if nvcc else ""
    release = re.search(r"release (\d+)\.\d+", text)
    if release and int(release[1]) >= 12:
        return nvcc
    old = f"{nvcc} must be release 12.0 or later, got {release[0] if release else 'no version'}"
    reason = old if nvcc else f"{name} is not on PATH"
    if wish == "1":
        raise SystemExit(f"setup: LSPM_CUDA=1, but {reason}")
    print(f"setup: the CUDA module is left out: {reason}", file=sys.stderr)
    return None


def gencode():
    text = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = [arch.removeprefix("compute_") for arch in text.split()]
    archs = chosen("LSPM_CUDA_ARCHS", known, [arch for arch in ("80", "90", "100") if arch in known], ";")
    # Before sm_100 the oldest one's PTX serves all: SASS differs by a few moves, time by a fifth.
    of = {arch: arch if int(arch) >= 100 else min(archs, key=int) for arch in archs}
    flags = [f"-gencode=arch=compute_{of[arch]},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{of[archs[-1]]},code=compute_{of[archs[-1]]}"]  # for later GPUs


class NinjaBuildExt(build_ext):
    """Writes one build.ninja for all modules and runs it."""

    def build_extensions(self):
        if not shutil.which(shlex.split(CXX)[0]):
            raise SystemExit(f"setup: a C++ compiler must be on PATH, got {CXX!r}; set CXX, or install g++")
        file = Path(os.path.relpath(self.build_temp), "build.ninja")  # relative: a checkout may be moved
        file.parent.mkdir(parents=True, exist_ok=True)
        self.edges = {}
        for module in self.extensions:
            self.add_module(module, file.parent)
        rules = (f"rule {name}\n  command = {command}" for name, command in RULES.items())
        file.write_text("\n".join([f"builddir = {file.parent}", *rules, *self.edges.values(), ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([sys.executable, "-m", "ninja", "-f", file, *jobs], check=False).returncode:
            raise SystemExit("setup: compiling csrc/ failed; the compiler's message stands above")

    def copy_extensions_to_source(self):  # what pip install -e ends with
        for module in self.extensions:
            Path(*module.name.split(".")).parent.mkdir(parents=True, exist_ok=True)
        super().copy_extensions_to_source()

    def add_module(self, module, temp):
        cuda = module.name.endswith("_cuda")
        objects = [self.add_object("csrc/bindings.cpp", temp / ("bindings_cuda" if cuda else "bindings"))]
        for source in module.sources:
            isa = "cuda" if cuda else module.name.split(".")[-2]
            if isa == "amx" and not asks_for("__AMX_", source):
                isa = "avx512_bf16"  # where the object is the same
            objects.append(self.add_object(source, temp / isa))
        self.add_edge(self.get_ext_fullpath(module.name), "nvlink" if cuda else "link", objects)

    def add_object(self, source, folder):  # which has the name of its rule
        inputs = [source]
        if folder.name in ISAS:
            inputs += ["|", self.add_edge(folder / f"{HEADER}.gch", f"{folder.name}.h", [f"csrc/{HEADER}"])]
        return self.add_edge(folder / (Path(source).name + ".o"), folder.name, inputs)

    def add_edge(self, out, rule, inputs):
        escaped = [os.path.relpath(path).replace(" ", "$ ") for path in (out, *inputs)]
        self.edges[out] = f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}"
        return out


def compiling(compiler, *flags):
    command = f"{compiler} -std=c++17 -Icsrc -MMD -MF $out.d {shlex.join(flags)} -c $in -o $out"
    return f"{command}\n  depfile = $out.d\n  deps = gcc"


NVCC = find_nvcc()
# All in one with bindings.cpp: what each takes to compile is mostly pybind11, the same for all.
BINDINGS = [*COMMON, "-O2", *INCLUDES, *(f"-include{path}" for path in sorted(glob("csrc/bindings_*.cpp")))]
HEADER = "cpu/precompiled.h"
RULES = {}
for isa, flags in ISAS.items():  # a compiler that cannot use the compiled header takes the one in csrc
    RULES[f"{isa}.h"] = compiling(CXX, *COMMON, *KERNEL, *flags)
    RULES[isa] = compiling(f"{CXX} -I'$builddir/{isa}' -include {HEADER}", *COMMON, *KERNEL, *flags)
RULES["bindings"] = compiling(CXX, *BINDINGS)
RULES["link"] = f"{CXX} -shared $in -o $out -fopenmp {shlex.join(SANITIZE) or '-Wl,-s'}"
known = list(ISAS) if platform.machine() == "x86_64" else ["base"]
isas = chosen("LSPM_ISAS", known, known, ", ")
modules = [Extension(f"lspm_kernels._cpu.{isa}._C", sorted(glob("csrc/cpu/*.cpp"))) for isa in isas]
if NVCC:
    RULES["cuda"] = compiling(NVCC, "-Xcompiler=-fPIC,-fvisibility=hidden,-O1", *gencode())  # for the host
    RULES["bindings_cuda"] = compiling(CXX, *BINDINGS, "-DLSPM_CUDA")
    RULES["nvlink"] = f"{NVCC} -shared -cudart static $in -o $out -Xlinker -s"
    modules.append(Extension("lspm_kernels._C_cuda", sorted(glob("csrc/cuda/*.cu"))))
setup(ext_modules=modules, cmdclass={"build_ext": NinjaBuildExt})
