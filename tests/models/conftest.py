"""Tokenizers that learned from a text, and the text."""

from pathlib import Path

import pytest

from lspm_models.data import corpus
from lspm_models.data.tokenizers import ByteBpe, Characters


@pytest.fixture(scope="session")
def sample():
    return Path(corpus.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def bpe(sample):
    return ByteBpe.train([sample], 300)


@pytest.fixture(scope="session")
def characters(sample):
    return Characters.train([sample], 100)
