"""A few mutations of tests/mutations.py; the script runs them all."""

import shutil
from dataclasses import replace

import mutations
import pytest

QUICK = ("row_sum: barrier before its shared memory is read lost", "a run up to the last row")


@pytest.mark.parametrize("mutation", mutations.all_mutations(), ids=lambda mutation: mutation.name)
def test_the_tables_fit_the_sources(mutation):
    mutations.mutated((mutations.ROOT / mutation.file).read_text(), mutation)


def test_a_table_that_does_not_fit_is_refused():
    mutation = mutations.Mutation("m", "f.cu", "missing", "", ())
    with pytest.raises(ValueError, match=r"^mutations: m: old must occur once in f\.cu, got 0$"):
        mutations.mutated("text", mutation)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize(
    "name", [QUICK[0], *(pytest.param(name, marks=pytest.mark.long) for name in QUICK[1:])]
)
def test_quick_mutations_turn_red(name, monkeypatch):
    monkeypatch.setenv("LSPM_CUDA_ON_CPU", "check")
    mutation = next(m for m in mutations.all_mutations() if m.name == name)
    result = mutations.run(replace(mutation, tests=(*mutation.tests, "-x")))
    assert result.caught, result.report
