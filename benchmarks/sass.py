"""What nvcc and Triton made of the GPU kernels, read from their machine code, without a GPU."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TENSOR_CORE = re.compile(r"[HIQDB]?MMA|HGMMA|IGMMA|QGMMA|UTC[HIQO]MMA")
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": bytes of shared memory of a
# multiprocessor. All three have 65536 registers, 64 warps and 32 blocks.
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
REGISTERS_AT_ONCE = 256  # a warp gets registers by the unit
RESERVED = {"sm_80": 1024, "sm_90": 0, "sm_100": 0}  # CUDA's own in each block; from sm_90 on ptxas counts it


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: registers of a thread, bytes of static shared memory, bytes spilled, its code."""

    name: str
    arch: str
    registers: int
    shared: int
    spilled: int
    most_threads: int | None
    code: list[tuple[int, str]]  # address, instruction

    def occupancy(self) -> float | None:
        """The part of a multiprocessor's warps that are at work, dynamic shared memory aside."""
        if self.most_threads is None:
            return None
        own = -(-self.most_threads // 32)
        registers = -(-self.registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE * own
        shared = SHARED[self.arch] // max(1, self.shared + RESERVED[self.arch])
        return min(BLOCKS, WARPS // own, REGISTERS // registers, shared) * own / WARPS

    def inner_loop(self) -> tuple[int, int]:
        """Tensor-core and other instructions of the shortest loop that has most of the former.

        A loop inside of it is counted once. Without tensor-core instructions, the longest innermost loop.
        """
        loops = [
            (int(target, 16), address)
            for address, text in self.code
            for target in re.findall(r"\bBRA(?:\.\w+)* (?:\w+, )?`?\(?0x([0-9a-f]+)", text)
            if int(target, 16) < address
        ]
        innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        counts = [self.count(*loop) for loop in loops]
        most = max((tensor for tensor, _ in counts), default=0)
        if most:
            return min(count for count in counts if count[0] == most)
        return max((self.count(*loop) for loop in innermost), default=(0, 0))

    def count(self, start: int, end: int) -> tuple[int, int]:
        """Tensor-core and other instructions between two addresses."""
        body = [text for address, text in self.code if start <= address <= end]
        tensor = sum(is_tensor_core(text) for text in body)
        return tensor, len(body) - tensor


def is_tensor_core(instruction: str) -> bool:
    opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction).split(".")[0].split()[0]
    return bool(TENSOR_CORE.fullmatch(opcode))


def missing() -> str | None:
    """Why machine code cannot be had here, or None."""
    if not shutil.which("nvcc"):
        return "nvcc is not on PATH"
    return None if _cuobjdump() else "cuobjdump is neither on PATH nor in triton"


def kernels(source: Path, arch: str) -> Iterator[Kernel]:
    """The kernels of a .cu file as nvcc compiles them for arch.

    Raises:
        subprocess.CalledProcessError: nvcc refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        options = ["-cubin", f"-arch={arch}", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{source.parent}"]
        _run("nvcc", *options, str(source), "-o", str(cubin))
        yield from compiled(cubin, arch)


def compiled(cubin: Path, arch: str) -> Iterator[Kernel]:
    """The kernels of a file of machine code for arch."""
    usage, elf, sass = (_run(_cuobjdump(), option, str(cubin)) for option in ("-res-usage", "-elf", "-sass"))
    codes = re.split(r"^\s*Function : (\S+)$", sass, flags=re.M)
    used = dict(re.findall(r"Function (\S+):\n\s*(REG:.*)", usage))
    for mangled, text in zip(codes[1::2], codes[2::2], strict=True):
        numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", used[mangled])}
        limit = re.search(
            rf"\.nv\.info\.{re.escape(mangled)}\n(?:(?!\.nv\.info).)*?EIATTR_MAX_THREADS.*?Value:\s*0x(\w+)",
            elf,
            re.S,
        )
        code = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", text, re.M)
        yield Kernel(
            name=_plain(mangled), arch=arch, registers=numbers["REG"], shared=numbers["SHARED"],
            spilled=numbers["STACK"] + numbers["LOCAL"], most_threads=int(limit[1], 16) if limit else None,
            code=[(int(address, 16), instruction) for address, instruction in code],
        )  # fmt: skip


def _plain(mangled: str) -> str:
    """The kernel's own name: no namespace, no template arguments."""
    plain = _run("c++filt", mangled).replace("(anonymous namespace)::", "")
    return re.search(r"(\w+)(?:<.*)?(?:\(|$)", plain)[1]


def _cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
