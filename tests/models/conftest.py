"""Tokenizers that learned from a text, and the text; scripts as they are run."""

import sys
from pathlib import Path

import pytest

from lspm_models.data.tokenizers import ByteBpe, Characters


@pytest.fixture(scope="session")
def sample():
    """Some Python in a file of its own, as each of its characters counts for the ids of tokens."""
    return (Path(__file__).parent / "sample.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def bpe(sample):
    return ByteBpe.train([sample], 300)


@pytest.fixture(scope="session")
def characters(sample):
    return Characters.train([sample], 100)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process; returns the exit code, stdout and stderr."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            code = script.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
