"""Kernels must write every element of their outputs: torch.empty is filled with NaN."""

import shutil

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(backend_of_test):
    # On a GPU some of plain PyTorch's gradients have no deterministic form: there it only warns.
    torch.use_deterministic_algorithms(True, warn_only=backend_of_test != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=[80, 90], ids="sm_{}".format)
def gpu(request):
    """Triton's driver of an emulated GPU."""
    triton_driver = pytest.importorskip("cuda_on_cpu.triton_driver", reason="triton is not installed")
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    with triton_driver.activated(request.param) as driver:
        yield driver


@pytest.fixture
def driver(gpu):
    """The same for one test, which must load nothing without a value for what is masked."""
    gpu.seed = 0
    gpu.launches.clear()
    yield gpu
    assert not gpu.lint
