"""What MatrixFactorization is asked for by mistake is refused by name, and numbers of NumPy are numbers."""

import math

import pytest
import torch
from models.test_matrix_factorization import interactions, small

from lspm_models.data.interactions import Interactions
from lspm_models.models.factor_methods import METHODS
from lspm_models.models.factorization_config import MatrixFactorizationConfig
from lspm_models.models.matrix_factorization import MatrixFactorization

MISUSES = {
    "method must be one of sgd, als, implicit-als, nmf, bpr, svd, got 'magic'": {"method": "magic"},
    "factors must be at least 1, got 0": {"factors": 0},
    "epochs must be at least 1, got -1": {"epochs": -1},
    "factors must be a whole number, got 1.5": {"factors": 1.5},
    "seed must be at least 0, got -1": {"seed": -1},
    "lr must be positive, got 0": {"lr": 0},
    "lr must be a number, got '1'": {"lr": "1"},
    "alpha must be positive, got nan": {"alpha": math.nan},
    "reg must be finite and at least 0, got -1": {"reg": -1, "method": "svd"},
    "weighted_reg must be finite and at least 0, got nan": {"weighted_reg": math.nan},
    "solver must be one of cholesky, cg, got 'lu'": {"solver": "lu"},
    "std must be positive, got inf": {"std": math.inf},
}


@pytest.mark.parametrize("message", MISUSES)
def test_bad_settings(message):
    with pytest.raises(ValueError) as error:
        MatrixFactorizationConfig.of(**MISUSES[message])
    assert str(error.value) == f"mf: {message}"


def test_bad_use():
    model = MatrixFactorization(small("nmf"))
    with pytest.raises(ValueError, match="mf: the model must be fitted before it is used"):
        model.recommend(["user1"])
    with pytest.raises(ValueError, match="mf: ratings must be at least 0 for nmf, got -1"):
        model.fit(Interactions.from_arrays(["a"], ["x"], [-1.0]))
    with pytest.raises(FloatingPointError, match=r"mf: RMSE while training of epoch \d+ must be finite"):
        (diverged := MatrixFactorization(small("sgd", lr=50.0))).fit(interactions())
    with pytest.raises(ValueError, match="mf: the model must be fitted before it is used"):
        diverged.recommend(["user1"])
    model = MatrixFactorization(small("sgd", epochs=1)).fit(interactions())
    for ask in (model.recommend, model.similar_items, lambda item, n: model.explain("user1", item, n)):
        with pytest.raises(
            ValueError,
            match=r"^(recommend|similar_items|explain): n must be a whole number of .* 1, got 0",
        ):
            ask("item1", 0)
    for users in ("user1", 1):
        with pytest.raises(ValueError, match=f"^recommend: users must be a sequence of ids, got {users!r}$"):
            model.recommend(users)
    for ids, got in (([60], 60), ([0, -2], -2)):
        with pytest.raises(ValueError, match=f"^predict: users must be internal ids, -1 to 59, got {got}$"):
            model.predict(torch.tensor(ids), torch.tensor([0]))
        with pytest.raises(ValueError, match=r"^predict: items must be internal ids, -1 to 39, got "):
            model.predict(torch.tensor([0]), torch.tensor(ids))
    with pytest.raises(ValueError, match="item must be one of the 40 known, got 'none such'"):
        model.similar_items("none such")
    with pytest.raises(ValueError, match="user must be one of the 60 known, got 'nobody'"):
        model.explain("nobody", "item1")


def test_numbers_of_numpy_are_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    settings = {"factors": numpy.int64(3), "epochs": numpy.int32(2), "lr": numpy.float32(0.25)}
    model = MatrixFactorization(small("sgd", **settings)).fit(interactions())
    model.save(tmp_path)
    assert MatrixFactorization.load(tmp_path).config == small("sgd", factors=3, epochs=2, lr=0.25)
    assert len(model.recommend(["user1"], numpy.int64(3))[0]) == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_is_of_no_consequence(method):
    given = ([1, 1, 2, 3], [4, 5, 4, 6], [5.0, 2.0, 3.0, 1.0])
    recommended = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            model = MatrixFactorization(small(method, epochs=2, factors=2)).fit(given)
            model.partial_fit(([9], [5], [2.0]))
            recommended.append([*model.recommend([1, 9], 3), model.explain(9, 4)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert recommended[0] == recommended[1]


@pytest.mark.parametrize("kind", [torch.tensor, torch.FloatTensor], ids=["tensor", "floats"])
def test_ids_of_a_tensor_are_those_of_a_list(kind):
    model = MatrixFactorization(small("sgd", epochs=2)).fit(
        ([1, 1, 2, 3], [4, 5, 4, 6], [5.0, 2.0, 3.0, 1.0])
    )
    assert model.recommend(kind([1, 3]), 2) == model.recommend([1, 3], 2) != model.recommend([8, 9], 2)
    assert model.recommend(kind([1, 3]).numpy(), 2) == model.recommend([1, 3], 2)
    assert model.explain(kind([1])[0], kind([6])[0]) == model.explain(1, 6)
