"""The CUDA module has every kernel for each architecture, and none spills registers."""

import re

import pytest

from cuda_on_cpu import build
from cuda_on_cpu.resources import ARCHITECTURES, of_module
from lspm_kernels import compiled

pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")

KERNELS = {
    name
    for source in (build.ROOT / "csrc" / "cuda").glob("*.cu")
    for name in re.findall(r"\b(\w+_kernel)\(", source.read_text())
}


@pytest.mark.skipif(compiled.cuda is None, reason="the CUDA module was not built")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture):
    kernels = of_module(compiled.cuda.__file__, architecture)
    if not kernels:
        pytest.skip(f"the CUDA module was not built for {architecture}")
    for kernel in kernels:
        assert (kernel.spills, kernel.stack) == (0, 0), kernel
    missing = {name for name in KERNELS if not any(name in kernel.kernel for kernel in kernels)}
    assert not missing
