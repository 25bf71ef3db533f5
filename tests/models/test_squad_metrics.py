"""Exact match and F1, as SQuAD's script has them."""

import pytest

from lspm_models.squad_metrics import exact_match, f1, normalised, scores


def test_scores_are_those_of_squad():
    assert normalised(" The  cat's,  A-Team (an) ") == "cats ateam"
    assert exact_match("the Theatre.", "theatre") == 1
    assert f1("the old town hall", "Old Town") == pytest.approx(2 * 2 / (3 + 2))
    assert f1("red red", "red red hat") == pytest.approx(2 * 2 / (2 + 3))
    assert (f1("", ""), f1("", "x"), f1("x y", "z")) == (1, 0, 0)
    right = [["in 1914", "1914"], [], ["the", "Rome"], ["the"]]
    found = scores(["1914!", "", "Rome", ""], right)
    assert found == [(1, 1), (1, 1), (1, 1), (1, 1)]  # an answer that is nothing when normalised is none
    assert scores(["x", "y"], [["x z"], []]) == [(0, pytest.approx(2 / 3)), (0, 0)]
