"""Fixtures of the tests that run models of transformers."""

import pytest
import torch
import torch.nn.functional as F

from lspm_kernels.compat import hugging_face


@pytest.fixture
def registered():
    hugging_face.register()


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


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of lspm_kernels.attention that models make."""
    seen, attention = [], hugging_face.attention
    monkeypatch.setattr(
        hugging_face,
        "attention",
        lambda q, k, v, **options: (seen.append({"q": q, "k": k, **options}), attention(q, k, v, **options))[
            1
        ],
    )
    return seen
