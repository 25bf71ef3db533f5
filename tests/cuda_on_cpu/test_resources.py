"""Every CUDA kernel compiles for each architecture, and none spills registers."""

import shutil

import pytest

from cuda_on_cpu import build
from cuda_on_cpu.resources import ARCHITECTURES, resources

SOURCES = sorted((build.ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills(source, architecture):
    kernels = resources(source, architecture)
    assert kernels
    for kernel in kernels:
        assert (kernel.spills, kernel.stack) == (0, 0), kernel
