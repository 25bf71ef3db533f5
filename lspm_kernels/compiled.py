"""The compiled kernels: `cpu`, for the best instruction set this machine has, and `cuda` where it was built.

The CPU module is picked once, at import, from what the processor and the operating system allow;
LSPM_ISA=base, avx2, avx512, avx512_bf16 or amx forces one. Nothing else in the package loads a compiled file.
"""

import importlib
import os
import platform
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType

import torch  # before the modules, so that they share its OpenMP runtime

# What each build needs, by the names in /proc/cpuinfo; the best build first.
_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NEEDS: dict[str, set[str]] = {
    "amx": _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": _V4 | {"avx512_bf16"},
    "avx512": _V4,
    "avx2": _V3,
    "base": set(),
}

# Why a build that would be better is not used, by instruction set; for `python -m lspm_kernels info`.
refusals: dict[str, str] = {}


# The calls of the Recording that is on in this thread.
recorded: ContextVar[list[tuple[Callable[..., object], tuple]] | None] = ContextVar(
    "lspm_recorded", default=None
)


def cpu_flags() -> set[str]:
    """This processor's features, as far as the operating system supports them."""
    return set(_cpuinfo("flags").split())


def cpu_maker() -> str:
    """What the maker calls itself, such as GenuineIntel; empty where the operating system does not tell."""
    return _cpuinfo("vendor_id")


def _cpuinfo(field):
    if platform.machine() == "x86_64" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith(field):
                    return line.split(":")[1].strip()
    return ""


def load_cpu(isa: str) -> ModuleType:
    """The module built for `isa`.

    Raises:
        ValueError: there is no such instruction set.
        ImportError: this machine lacks it, or it was not built.
    """
    if isa not in NEEDS:
        raise ValueError(f"lspm_kernels: LSPM_ISA must be one of {', '.join(reversed(NEEDS))}, got {isa!r}")
    if lacking := NEEDS[isa] - cpu_flags():
        raise ImportError(
            f"lspm_kernels: {isa} needs {', '.join(sorted(lacking))}, which this processor lacks"
        )
    try:
        return importlib.import_module(f"lspm_kernels._cpu.{isa}._C")
    except ModuleNotFoundError:
        raise ImportError(f"lspm_kernels: {isa} was not built") from None


def _best_cpu() -> ModuleType:
    if forced := os.environ.get("LSPM_ISA"):
        try:
            return load_cpu(forced)
        except (ValueError, ImportError) as error:
            raise _import_error(str(error)) from None
    for isa in NEEDS:
        try:
            return load_cpu(isa)
        except ImportError as error:
            refusals[isa] = str(error).removeprefix("lspm_kernels: ")
    raise _import_error(
        f"lspm_kernels: no compiled kernels in {os.path.dirname(__file__)}: if this is the source tree, "
        "run `pip install -e .` in it, or start Python from another folder"
    )


def _import_error(message):
    # By its name `python -m lspm_kernels` knows that it is its own, and ends with the message alone.
    return ImportError(message, name="lspm_kernels")


def _cuda() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("lspm_kernels._C_cuda"), None
    except ModuleNotFoundError:
        return None, "the CUDA module, which was not built (it needs nvcc)"
    except ImportError as error:
        return None, f"the CUDA module, which does not load: {error}"


cpu = _best_cpu()
cuda, _cuda_refusal = _cuda()
sys.modules["lspm_kernels._C"] = cpu


def cpu_kernel(name: str) -> Callable[..., None]:
    """The CPU kernel `name`, on as many threads as torch uses."""
    return lambda *args: call(getattr(cpu, name), *args, torch.get_num_threads())


def call(function: Callable[..., object], *args: object) -> None:
    """Calls function, and again at each replay of the recording that is on, which has none of its calls."""
    if (calls := recorded.get()) is None:
        function(*args)
        return
    token = recorded.set(None)
    try:
        function(*args)
    finally:
        recorded.reset(token)
    calls.append((function, args))


def cuda_kernel(name: str) -> Callable[..., None]:
    """The CUDA kernel `name`, which has no use for the number of threads."""
    return lambda *args: getattr(cuda, name)(*args, 0)


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run here; None where they can."""
    return _cuda_refusal or (None if torch.cuda.is_available() else "a CUDA GPU, which this machine lacks")


def nothing_missing() -> None:
    """The CPU kernels can run wherever this package was imported."""
