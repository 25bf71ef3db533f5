"""A Triton driver that executes, on CPU tensors, the PTX Triton compiles for a GPU.

    with triton_driver.activated(sm=90) as driver:
        kernel[grid](cpu_tensors, ...)

Triton specialises the kernel and calls its own ptxas as on a GPU; then ptx2cpp makes the PTX a library that
the runtime beside this file executes and checks. What it finds (a race, an access out of bounds, an
uninitialised value) is raised as library.KernelError, with the line of the Triton source.
"""

import contextlib
import ctypes
import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, expand_signature
from triton.runtime.cache import get_cache_manager

from cuda_on_cpu import build
from cuda_on_cpu.library import Library, as_c

TRITON_CACHE = build.CACHE / "triton"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have, CUDA guide's table
MASK_WITHOUT_OTHER = re.compile(r"tt\.load %\w+(?:#\d+)?, %\w+(?:#\d+)? (?![^:\n]*,)[^\n]*")
TILE_CONVERSION = re.compile(r"ttg\.convert_layout [^\n]* : tensor<\d+x\d+x")
FLOAT16 = {"fp16": torch.float16, "bf16": torch.bfloat16}
SCALARS = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, read from its cubin."""

    kernel: str
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    shared: int  # bytes per block
    conversions: int  # two-dimensional tiles that change their layout, through shared memory
    cubin: Path


def uninitialised(tensor):
    """Marks a tensor: its first launch may not read it before writing it, and what stays unwritten is NaN."""
    tensor.uninitialised = True
    return tensor


def unwritten(launcher, outputs):
    """A launcher whose arguments at these places start as uninitialised."""

    def launch(*args):
        for i in outputs:
            if args[i] is not None:
                uninitialised(args[i])
        launcher(*args)

    return launch


@contextlib.contextmanager
def activated(sm, *, flavour="check", seed=0, execute=True):
    """Makes Triton launch through an emulated GPU of compute capability `sm`; restores its driver on leaving.

    Args:
        sm: 80, 90 or 100.
        flavour: "check", or "fast" without the checks of every access.
        seed: of the order in which warps and blocks run.
        execute: False compiles the kernels and records their resources without running them.

    Yields:
        Driver, whose `lint`, `resources` and `launches` tell about the kernels launched within.
    """
    config = triton.runtime.driver
    previous = config._active
    driver = Driver(sm, flavour, seed, execute)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(TRITON_CACHE)
        config.set_active(driver)
        try:
            yield driver
        finally:
            config._active = previous


class Driver(DriverBase):
    """What Triton asks of a GPU's driver, answered for an emulated GPU.

    Attributes:
        lint: the masked loads without `other`. Triton leaves their value undefined and its PTX happens to
            give 0, so only the intermediate code shows them.
        resources: Resources of every kernel compiled, where nothing is executed.
        launches: names of the kernels launched, in order.
    """

    def __init__(self, sm, flavour, seed, execute):
        self.sm, self.flavour, self.seed, self.execute = sm, flavour, seed, execute
        self.lint, self.resources, self.launches = [], [], []
        self.launcher_cls = functools.partial(Launcher, self)
        self.utils = self  # Triton's name for what loads binaries and knows the device

    @classmethod
    def is_active(cls):
        return False

    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self):
        return self  # a key of Triton's cache in memory: nothing compiled here is seen by another driver

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("triton_driver: an emulated GPU has no timings")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("triton_driver: there is no C launcher")

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_MEMORY[self.sm]}

    def load_binary(self, name, cubin, shared, device):
        """The module, the function, its registers, its spills, its most threads: only the last is used."""
        return None, None, 0, 0, 1024

    def unload_module(self, module):
        pass


class Launcher:
    """Launches one compiled kernel; Triton makes it with the kernel and calls it with the arguments."""

    def __init__(self, driver, source, metadata):
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.tensordesc_meta:
            unsupported = "clusters, cooperative grids and tensor descriptors"
            raise NotImplementedError(f"triton_driver: {metadata.name} must do without {unsupported}")
        self.driver, self.metadata = driver, metadata
        self.types = flattened(expand_signature(source.signature.values(), metadata.tensordesc_meta, ""))
        self.files = get_cache_manager(metadata.hash)
        driver.lint += MASK_WITHOUT_OTHER.findall(self.stage("ttir").read_text())
        if driver.execute:
            self.library = Library(build.exported(self.stage("ptx").read_text(), driver.flavour))
            self.function = ctypes.cast(getattr(self.library.c, f"ptx_{metadata.name}"), ctypes.c_void_p)
        else:
            driver.resources.append(self.resources())

    def stage(self, name):
        """The file of a stage of the compilation."""
        return Path(self.files.get_file(f"{self.metadata.name}.{name}"))

    def resources(self):
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", self.stage("cubin")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        return Resources(
            kernel=self.metadata.name,
            warps=self.metadata.num_warps,
            registers=used["REG"],
            stack=used["STACK"] + used["LOCAL"],
            shared=self.metadata.shared,
            conversions=len(TILE_CONVERSION.findall(self.stage("ttgir").read_text())),
            cubin=self.stage("cubin"),
        )

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
        self.driver.launches.append(self.metadata.name)
        if not self.driver.execute:
            return
        copies = Copies(self.library)
        scratch = (self.metadata.global_scratch_size, self.metadata.profile_scratch_size)
        try:
            pairs = zip(self.types, flattened(values), strict=True)
            arguments = [as_argument(copies, ty, value) for ty, value in pairs if ty != "constexpr"]
            for size in scratch:  # Triton's hidden arguments, last
                arguments.append(as_c(self.library.empty(size * x * y * z, torch.uint8) if size else None))
            self.run((x, y, z), arguments)
            copies.copy_back()
        finally:
            self.library.free()

    def run(self, grid, arguments):
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        shared = ctypes.c_size_t(self.metadata.shared)
        self.library.configure(self.driver.seed, shared_max=SHARED_MEMORY[self.driver.sm])
        self.library.c.emu_set_smem_optin(self.function, shared)
        counts = [ctypes.c_uint(n) for n in (*grid, self.metadata.num_warps * 32)]
        try:
            self.library.call("emu_launch_ptx", self.function, *counts, shared, addresses)
        finally:
            self.library.configure()


class Copies:
    """The storages of a launch's tensors in emulated device memory; tensors that share one share its copy."""

    def __init__(self, library):
        self.library = library
        self.buffers = {}  # address of the storage -> its bytes, their copy

    def pointer(self, tensor):
        if targets := getattr(tensor, "addresses_of", None):
            return self.table(tensor, targets)
        storage = tensor.untyped_storage()
        host = storage.data_ptr()
        if host not in self.buffers:
            content = torch.empty(0, dtype=torch.uint8).set_(storage)
            buffer = self.library.empty(content.shape, torch.uint8)
            if not getattr(tensor, "uninitialised", False):
                buffer.upload(content)
            tensor.uninitialised = False
            self.buffers[host] = content, buffer
        return ctypes.c_void_p(self.buffers[host][1].pointer.value + tensor.data_ptr() - host)

    def table(self, tensor, targets):
        """A copy of a table of addresses, those of the tensors that it is marked with, as they are there."""
        there = {t.data_ptr(): self.pointer(t).value for t in targets if t.numel()}
        translated = torch.tensor([there.get(address, 0) for address in tensor.flatten().tolist()])
        return self.library.copy(translated).pointer

    def copy_back(self):
        for content, buffer in self.buffers.values():
            content.copy_(buffer.tensor())


def as_argument(copies, ty, value):
    """The C object that a value of Triton's type `ty` is passed in."""
    if ty.startswith("*"):
        return as_c(None) if value is None else copies.pointer(value)
    if ty in FLOAT16:
        return ctypes.c_int16(torch.tensor(value, dtype=FLOAT16[ty]).view(torch.int16).item())
    return SCALARS[ty](value)


def flattened(values):
    """The leaves of nested tuples."""
    return [leaf for v in values for leaf in (flattened(v) if isinstance(v, tuple) else [v])]
