"""Settings of the whole suite."""

import collections
import os
import re

# One competing process turns a parallel region of a millisecond into twelve when OpenMP's threads spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels

# "op: cuda needs dtype ..., got ...", or the op's table has no such row; within what torch.compile says.
REFUSAL = re.compile(r"\w+: (cuda|triton) needs [^\n]*|\w+: backend must be one of [^\n]*")


def pytest_generate_tests(metafunc):
    """What is marked every_backend runs on the CPU and, where there is a GPU, on each of its backends too."""
    if metafunc.definition.get_closest_marker("every_backend") and torch.cuda.is_available():
        on_cpu = [] if metafunc.definition.get_closest_marker("gpu") else ["cpu"]
        on_gpu = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]
        metafunc.parametrize("backend_of_test", [*on_cpu, *on_gpu], indirect=True)


def what_it_compiles(item):
    """Of which most tests compile their own, for seconds; or None."""
    if item.module.__name__.endswith("_triton"):
        return item.module
    return "inductor" if "inductor" in item.name else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Of the tests of a file that runs Triton, and of those with inductor, make test runs one in eight."""
    counts = collections.Counter()
    for item in items:
        if (what := what_it_compiles(item)) and not item.get_closest_marker("long"):
            if counts[what] % 8:
                item.add_marker(pytest.mark.long)
            counts[what] += 1
    if named := next((item.nodeid for item in items if " at 0x" in item.nodeid), None):
        raise pytest.UsageError(f"a test must have the same name in every process, got {named}")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def backend_of_test(request):
    """Makes a test's tensors on a GPU and runs one backend's kernels there, if that is what it was given."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # by default plain PyTorch errs as TF32 does
    with lspm_kernels.use_backend(name):
        yield name
    torch.set_default_device(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A call that a GPU's backend refuses, as its table says, is no failure of a test of every backend."""
    try:
        return (yield)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        refusal = REFUSAL.search(str(error))
        if item.get_closest_marker("gpu") and refusal:
            pytest.skip(refusal[0])
        raise


@pytest.fixture(autouse=True)
def seeded(backend_of_test):
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def wide_softmax(monkeypatch):
    """Eager takes softmax in float32 even of float64, so that its mask's least number is -inf, then NaN."""
    softmax = F.softmax
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, dim=None, dtype=None: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype),
    )
