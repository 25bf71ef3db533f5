"""Fixtures of the tests that run models of transformers."""

import pytest

from lspm_kernels.compat import hugging_face


@pytest.fixture
def registered():
    hugging_face.register()


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
