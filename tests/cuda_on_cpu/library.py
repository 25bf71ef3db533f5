"""Calls the C functions of a kernel library with PyTorch tensors in emulated device memory."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys

import asan
import pytest
import torch

from cuda_on_cpu import build

FLAVOURS = os.environ.get("LSPM_CUDA_ON_CPU", "fast check ptxcheck").split()

COUNTERS = ("mma", "ldmatrix", "ldmatrix_conflicts", "cp_async", "shuffles", "barriers")
SHARED_MAX = 163 * 1024  # bytes of a block on sm_80


class KernelError(RuntimeError):
    """What a C entry returned, or what the emulator found in the kernel."""


class Buffer:
    """Device memory of a tensor's size. It starts as NaN, and as uninitialised for the checker."""

    def __init__(self, library, shape, dtype, misaligned=False):
        self.library = library
        self.host = torch.empty(shape, dtype=dtype)
        shift = self.host.element_size() if misaligned else 0
        self.start = library.c.emu_malloc(ctypes.c_size_t(self.host.nbytes + shift))
        self.pointer = ctypes.c_void_p(self.start + shift)

    def upload(self, tensor):
        self.library.c.emu_memcpy(
            self.pointer, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        )
        return self

    def tensor(self):
        """A copy on the host."""
        ctypes.memmove(self.host.data_ptr(), self.pointer, self.host.nbytes)
        return self.host.clone()


class Library:
    """A kernel library. Buffers live until free()."""

    def __init__(self, path, seed=0):
        self.c = ctypes.CDLL(str(path))
        self.c.emu_malloc.restype = ctypes.c_void_p
        self.c.emu_last_error.restype = ctypes.c_char_p
        self.c.emu_stat.restype = ctypes.c_uint64
        self.c.emu_last_stream.restype = ctypes.c_void_p
        self.buffers = []
        self.configure(seed)

    def configure(self, seed=0, strict=True, shared_max=SHARED_MAX):
        self.c.emu_configure(ctypes.c_uint64(seed), int(strict), ctypes.c_size_t(shared_max))

    def empty(self, shape, dtype=torch.float32, misaligned=False):
        self.buffers.append(Buffer(self, shape, dtype, misaligned))
        return self.buffers[-1]

    def copy(self, tensor, misaligned=False):
        """The tensor in device memory; None stays None."""
        if tensor is None:
            return None
        return self.empty(tensor.shape, tensor.dtype, misaligned).upload(tensor.detach().contiguous())

    def call(self, name, *arguments):
        """Calls a C entry that returns a message or null; raises KernelError with what went wrong."""
        entry = getattr(self.c, name)
        entry.restype = ctypes.c_char_p
        message = entry(*(as_c(a) for a in arguments))
        found = message or self.c.emu_last_error()
        self.c.emu_clear_error()
        if found:
            raise KernelError(found.decode())

    def counters(self):
        """Since the last call: instructions by kind."""
        return {name: self.c.emu_stat(i) for i, name in enumerate(COUNTERS)}

    def free(self):
        for buffer in self.buffers:
            self.c.emu_free(ctypes.c_void_p(buffer.start))
        self.buffers.clear()


@functools.cache
def load(flavour, *sources, ptx_kernels=""):
    """The library of kernels and their entries, as build.kernels makes it."""
    return Library(build.kernels(sources, flavour, ptx_kernels))


def with_long(flavours, long=("fast", "ptxcheck")):
    """Flavours as parameters: `fast`, which `check` includes, and what takes long are for make test-long."""
    return [pytest.param(f, marks=[pytest.mark.long] if f in long else []) for f in flavours]


USUAL = with_long(FLAVOURS)


def fixture(*sources, ptx_kernels="", flavours=USUAL):
    """A fixture that is load()'s library in each flavour, by default LSPM_CUDA_ON_CPU's or all but asan."""

    @pytest.fixture(params=flavours)
    def library(request):
        if request.param == "ptxcheck" and not shutil.which("nvcc"):
            pytest.skip("nvcc is not installed")
        library = load(request.param, *sources, ptx_kernels=ptx_kernels)
        library.flavour = request.param
        yield library
        library.configure()
        library.free()

    return library


def as_c(argument):
    if isinstance(argument, Buffer):
        return argument.pointer
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def check_messages(kernels, monkeypatch, dtypes, calls, code):
    """Every entry, by its name in `calls`, refuses a device that is none and a dtype's code that is none."""
    kernels.where = 17, None
    for call in calls.values():
        with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid "):
            call()
    monkeypatch.setitem(dtypes, torch.float32, code)
    for name, call in calls.items():
        with pytest.raises(KernelError, match=f"^{name}: dtype must be f32, bf16 or f16, got {code}$"):
            call()


def run_under_asan(*command):
    """Runs Python with AddressSanitizer loaded; raises KernelError with what it says."""
    environment = asan.environment() | {"LSPM_CUDA_ON_CPU": "asan"}
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )
    if result.returncode:
        raise KernelError((result.stdout + result.stderr)[-6000:])


def run_tests_under_asan(file):
    """Runs a test file again with LSPM_CUDA_ON_CPU=asan."""
    run_under_asan("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
