"""This machine, as benchmarks need to know it: its name, its versions, its caches, its measured roofs."""

import ctypes
import datetime
import functools
import gc
import multiprocessing
import os
import platform
import re
import subprocess
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch loads OpenMP: a thread that spins while it waits turns another process's work into noise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

ROOT = Path(__file__).resolve().parent.parent
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
SLOWEST_KERNEL = 1e10  # FLOP/s: below, torch has none
# What forces an instruction set upon us, upon torch and upon the libraries under it.
FORCING = ("LSPM_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def processor(device: str = "cpu") -> str:
    """The model name of the CPU or GPU; with the family where several generations share the name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family)\s*:\s*(.+)$", cpuinfo.read_text(), re.M))
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} family {found['cpu family']}" if name == "AMD EPYC" else name


def slug(device: str = "cpu") -> str:
    """A file name for this machine: its processor and, on a CPU, the threads in use and the instruction set
    where LSPM_ISA forces one; never a host's name."""
    plain = re.sub(r"\((R|TM)\)|@.*", "", processor(device), flags=re.I).lower()
    words = re.findall(r"[a-z0-9]+", plain)
    if device == "cpu":
        words += [f"{torch.get_num_threads()}-threads", *filter(None, [os.environ.get("LSPM_ISA")])]
    return "-".join(words)


def description(device: str = "cpu") -> dict:
    """What a result must carry to be compared with another."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "machine": slug(device),
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "forced": " ".join(f"{name}={os.environ[name]}" for name in FORCING if name in os.environ),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "gcc": _output("g++", "-dumpfullversion"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache: data that must come from memory is rotated through more than this."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    unit = {"K": 2**10, "M": 2**20}
    found = [int(text[:-1]) * unit[text[-1]] for text in (path.read_text().strip() for path in sizes)]
    return max(found, default=64 * 2**20)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, as torch does on a GPU.

    By default glibc returns a large tensor to the kernel when it dies, and the page faults of the next one
    cost more than a layer norm over it: such a benchmark times the allocator.
    """
    _set_malloc(mmap_threshold=2**30, trim_threshold=2**31 - 1)


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int | None:
    """The most memory in use at once while function() runs, above what was in use before it.

    On a CPU these are resident pages: scratch that torch does not know of is counted, memory that is never
    touched is not. Meanwhile glibc gives back at once what is freed, later it keeps it. None where the
    operating system cannot tell.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not (reset.exists() and _has_glibc()):
        return None
    _set_malloc(mmap_threshold=2**17, trim_threshold=2**17)
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # sets VmHWM to VmRSS: proc(5)
    before = resident_bytes("VmRSS")
    function()
    peak = resident_bytes("VmHWM")
    keep_freed_memory()
    return max(0, peak - before)


def second_peak(make: Callable[[], Callable[[], object]], device: str = "cpu") -> int | None:
    """peak_bytes of the second call of make(), in a process of its own: what was freed here would serve."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_second_peak, (make, device))


def _second_peak(make, device):
    function = make()
    peak_bytes(function, device)  # with what only a first call does
    return peak_bytes(function, device)


def _round(size: int) -> Callable[[int], Iterator[slice]]:
    """A function of a count: the next so many places of `size`, round and round from where the last ended."""
    position = 0

    def places(count: int) -> Iterator[slice]:
        nonlocal position
        while count:
            position = 0 if position >= size else position
            begin, position = position, min(position + count, size)
            count -= position - begin
            yield slice(begin, position)

    return places


@functools.cache
def copy_roof(device: str = "cpu") -> Callable[[int], None]:
    """A plain copy that reads and writes `moved` bytes in all, from and to memory that no cache holds."""
    size = last_level_cache(device) + 2**26
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # touches every page
    places = _round(source.numel())

    def copy(moved: int) -> None:
        for part in places(moved // 8):
            target[part].copy_(source[part])

    return copy


@functools.cache
def read_roof(device: str = "cpu") -> Callable[[int], None]:
    """A sum, which reads `moved` bytes and writes nothing, from memory that no cache holds."""
    source = torch.ones((last_level_cache(device) + 2**26) // 4, dtype=torch.float32, device=device)
    places = _round(source.numel())

    def read(moved: int) -> None:
        for part in places(moved // 4):
            source[part].sum()

    return read


@functools.cache
def matmul_roof(dtype: torch.dtype, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """A square product of the dtype, as torch's library computes it, and its floating-point operations.

    A small one where the library has no kernel for this processor, as for bfloat16 without AVX-512: plain
    loops would take a minute for the large one.
    """

    def product(size: int) -> tuple[Callable[[], object], int]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return functools.partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * size**3

    multiply, flops = small = product(MATMUL_SIZE[device] // 8)
    seconds = min(timeit.repeat(lambda: (multiply(), synchronize(device)), repeat=4, number=1))
    return small if flops / seconds < SLOWEST_KERNEL else product(MATMUL_SIZE[device])


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _set_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    """From what size on memory is the kernel's at once, and how much may lie free at the end of the heap."""
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)


def resident_bytes(field: str) -> int:
    """A field of Linux's /proc/self/status: VmRSS, or VmHWM, the most it was."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB", status, re.M)[1]) * 1024


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    sources = ("csrc", "lspm_kernels", "python", "benchmarks/*.py")
    changed = _output("git", "status", "--porcelain", "--", *sources)
    return f"{commit}+changes" if commit and changed else commit
