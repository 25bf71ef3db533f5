"""Settings of the whole suite."""

import os

# One competing process turns a parallel region of a millisecond into twelve when OpenMP's threads spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
