"""What nvcc makes of the kernels: registers, spills, shared memory, and SASS instructions by kind.

python -m cuda_on_cpu.resources [kernels.cu ...]        (in tests/)
"""

import collections
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu import build

ARCHITECTURES = {"sm_80": "compute_80", "sm_90": "compute_80", "sm_100": "compute_100"}  # as setup.py has it
SASS_KINDS = {
    "16-byte loads": r"LDG\..*128",
    "16-byte stores": r"STG\..*128",
    "shuffles": "SHFL",
    "barriers": r"BAR\.",
    "tensor core": r"HMMA|.*GMMA|UTC",
    "local memory": "LDL|STL",
}
USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.S,
)

USAGE_OF_MODULE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # bytes stored and loaded, or of local memory
    shared: int  # bytes per block, static


def compile_for(source, architecture):
    """The cubin of a kernel file and what ptxas says about it."""
    options = ["-std=c++17", "-O3", f"-gencode=arch={ARCHITECTURES[architecture]},code={architecture}"]
    options += ["-Xptxas", "-v", f"-I{build.ROOT / 'csrc'}", f"-I{build.ROOT / 'csrc' / 'cuda'}"]
    key = build.digest("cubin", Path(source).read_text(), build.headers(), *options)
    log = build.CACHE / f"{key}.log"

    def command(out):
        build.CACHE.mkdir(parents=True, exist_ok=True)
        return ["sh", "-c", '"$@" 2> "$0"', log, shutil.which("nvcc"), *options, "-cubin", "-o", out, source]

    return build.cached(key, ".cubin", command), log.read_text()


def resources(source, architecture):
    """Resources of every kernel of a file."""
    found = []
    for name, stack, stores, loads, registers, rest in USAGE.findall(compile_for(source, architecture)[1]):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        shared = int(shared[1]) if shared else 0
        found.append(Resources(readable(name), architecture, int(registers), int(stack), spills, shared))
    return sorted(found, key=lambda r: r.kernel)


def cuobjdump(*arguments):
    """What triton's cuobjdump prints."""
    triton = Path(importlib.util.find_spec("triton").submodule_search_locations[0])
    command = [triton / "backends" / "nvidia" / "bin" / "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_module(path, architecture):
    """Resources of every kernel that the CUDA module has for an architecture, as it was built."""
    text = cuobjdump("--dump-resource-usage", path)
    parts = [part for part in text.split("arch = ") if part.startswith(f"{architecture}\n")]
    return [
        Resources(name, architecture, int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in USAGE_OF_MODULE.findall("".join(parts))
    ]


def sass(source, architecture):
    """{kernel: Counter of SASS_KINDS and "all"}, from triton's cuobjdump."""
    cubin, _ = compile_for(source, architecture)
    listing = cuobjdump("-sass", cubin)
    counts, kernel = collections.defaultdict(collections.Counter), None
    for line in listing.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = readable(match[1])
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", line):
            counts[kernel]["all"] += 1
            for kind, pattern in SASS_KINDS.items():
                counts[kernel][kind] += bool(re.match(pattern, match[1]))
    return counts


def readable(mangled):
    """The C++ name without namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|lspm::cuda::|^void |__nv_|__", "", name.strip())
    return re.sub(r"\(.*", "", name)


def main(sources):
    columns = ["registers", "spills", "shared", "SASS", *SASS_KINDS]
    for source in sources:
        for architecture in ARCHITECTURES:
            counts = sass(source, architecture)
            print(f"\n{Path(source).name} {architecture}")
            print(f"{'':52s}" + "  ".join(columns))
            for kernel in resources(source, architecture):
                count = counts[kernel.kernel]
                values = [kernel.registers, kernel.spills, kernel.shared, count["all"]]
                values += [count[kind] for kind in SASS_KINDS]
                print(
                    f"{kernel.kernel:52s}"
                    + "  ".join(f"{v:{len(c)}d}" for v, c in zip(values, columns, strict=True))
                )


if __name__ == "__main__":
    main(sys.argv[1:] or sorted((build.ROOT / "csrc" / "cuda").glob("*.cu")))
