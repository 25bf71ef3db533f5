"""Kernels must write every element of their outputs: torch.empty is filled with NaN."""

import itertools
import shutil

import pytest
import torch

from lspm_kernels import compiled


@pytest.fixture(autouse=True)
def poisoned_memory(backend_of_test):
    # On a GPU some of plain PyTorch's gradients have no deterministic form: there it only warns.
    torch.use_deterministic_algorithms(True, warn_only=backend_of_test != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def number_of_threads():
    """Restored after a test, whatever it set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def most_allocated():
    """A function that gives the most bytes of tensors alive at once within a call, above those before it."""

    def most_allocated(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        return max(itertools.accumulate(changes))

    return most_allocated


@pytest.fixture(scope="session")
def amx():
    """The kernels on AMX tiles: the processor's, or a model of the instructions where it has none."""
    try:
        return compiled.load_cpu("amx")
    except ImportError:
        if not compiled.NEEDS["avx512_bf16"] <= compiled.cpu_flags() or not shutil.which("g++"):
            pytest.skip("needs a processor with avx512_bf16, and g++")
        return pytest.importorskip("amx_on_cpu.build", reason="pybind11 is not installed").module()


OF_TEST_LONG = ("base", "avx2", "avx512")  # make test does not build them


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.long] if name in OF_TEST_LONG else [])
        for name in reversed(compiled.NEEDS)
    ]
)
def isa(request, monkeypatch):
    """The ops run the CPU kernels of each instruction set that was built and that this machine has."""
    try:
        module = compiled.load_cpu(request.param)
    except ImportError as error:
        pytest.skip(str(error))
    assert module.isa == request.param
    monkeypatch.setattr(compiled, "cpu", module)
    return request.param


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
