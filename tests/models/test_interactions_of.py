"""Ratings as people have them, a sparse matrix, columns or a frame, are the same to a factorisation."""

import gzip

import numpy as np
import pytest
import torch

from lspm_models.data.interactions import Interactions
from lspm_models.data.interactions_of import interactions_of
from lspm_models.data.rating_files import read_interactions
from lspm_models.models.matrix_factorization import MatrixFactorization, MatrixFactorizationConfig

USERS, ITEMS, RATINGS = [0, 0, 2, 2], [1, 3, 0, 3], [5.0, 0.0, 3.0, 4.0]  # user 1 and item 2 have none
CONFIG = MatrixFactorizationConfig.of("sgd", factors=3, epochs=2)


def matrices():
    indptr, indices, values = torch.tensor([0, 2, 2, 4]), torch.tensor([1, 3, 0, 3]), torch.tensor(RATINGS)
    with torch.sparse.check_sparse_tensor_invariants():
        yield torch.sparse_coo_tensor(torch.tensor([USERS, ITEMS]), values, (3, 4))
        yield torch.sparse_coo_tensor(torch.tensor([USERS, ITEMS]), values, (3, 4)).to_sparse_csc()
        yield torch.sparse_csr_tensor(indptr, indices, values, (3, 4))


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("place", range(4))
def test_rows_and_columns_of_a_matrix_are_the_ids(place):
    if place == 3:
        scipy = pytest.importorskip("scipy.sparse")
        matrix = scipy.csr_matrix((RATINGS, ITEMS, [0, 2, 2, 4]), shape=(3, 4))
    else:
        matrix = list(matrices())[place]
    found = interactions_of(matrix)
    assert found.user_ids.names == [0, 1, 2]
    assert found.item_ids.names == [0, 1, 2, 3]
    triples = sorted(zip(found.users.tolist(), found.items.tolist(), found.ratings.tolist(), strict=True))
    assert triples == sorted(zip(USERS, ITEMS, RATINGS, strict=True))
    model = MatrixFactorization(CONFIG).fit(matrix)
    assert len(model.recommend([1], 4)[0]) == 4  # an empty row
    assert {r.item for r in model.recommend([2], 4)[0]} == {1, 2}


def test_columns_and_frames():
    expected = Interactions.from_arrays(USERS, ITEMS, RATINGS, [1, 2, 3, 4])
    frame = {"user": USERS, "item": ITEMS, "rating": RATINGS, "weight": [1, 2, 3, 4]}
    for ratings in ((USERS, ITEMS, RATINGS, [1, 2, 3, 4]), frame, expected):
        assert interactions_of(ratings).fingerprint() == expected.fingerprint()
    assert interactions_of(expected) is expected
    assert interactions_of((np.array(USERS), ITEMS)).ratings.tolist() == [1, 1, 1, 1]
    pandas = pytest.importorskip("pandas")
    model = MatrixFactorization(CONFIG).fit(pandas.DataFrame(frame).astype({"user": "str"}))
    assert model.interactions.user_ids.names == ["0", "2"]
    for kind in (torch.float32, torch.bfloat16):
        values = torch.tensor(RATINGS, dtype=kind, requires_grad=True)
        assert interactions_of((USERS, ITEMS, values)).ratings.tolist() == RATINGS
    model.partial_fit((["7", "7"], [0, 1], [5.0, 4.0]))
    assert len(model.recommend(["7"], 9)[0]) == 1


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (None, "ratings must be Interactions, a sparse matrix, 2 to 4 columns or a data frame, got NoneType"),
        (torch.ones(2, 2), "ratings must be Interactions, .* got Tensor"),
        (([1],), "ratings must be Interactions, .* got tuple"),
        (torch.zeros(2, 2).to_sparse(), "users must hold at least one rating, got none"),
        (torch.ones(2, 2, 2).to_sparse(), r"ratings must be a matrix of users by items, got \(2, 2, 2\)"),
        ((1, 2, 3.0), "users must be a column of ids, got 1"),
        (("ab", ["c", "d"]), "users must be a column of ids, got 'ab'"),
        (([1, 2], [3, 4], 5.0), "ratings must be as many as users, 2, got no column"),
        (([1, 2], [3, 4], torch.ones(2) * 1j), "ratings must be numbers, got others: complex128"),
        ((torch.ones(2, 2) * torch.nan).to_sparse(), r"ratings\[0\] must be a finite number, got nan"),
    ],
)
def test_what_holds_no_ratings(ratings, message):
    with pytest.raises(ValueError, match=f"^interactions: {message}$"):
        MatrixFactorization(CONFIG).fit(ratings)


def test_a_file_is_what_it_begins_with(tmp_path):
    (tmp_path / "packed").write_bytes(gzip.compress(b"1,2,3\n2,2,4\n"))
    assert read_interactions(tmp_path / "packed").ratings.tolist() == [3, 4]
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"user": ["a", "b"], "item": [1, 2]}).to_parquet(tmp_path / "r.pq")
    assert read_interactions(tmp_path / "r.pq").user_ids.names == ["a", "b"]


class LikePolars(dict):
    """A frame that, other than one of pandas, gives its columns where it is iterated over."""

    columns = property(lambda self: list(self.keys()))

    def __iter__(self):
        return iter(self.values())


def test_frames_of_polars():
    frame = LikePolars(user=["a", "b"], item=[1, 2], rating=[3.0, 4.0])
    assert interactions_of(frame).user_ids.names == ["a", "b"]
    frame.collect = None
    with pytest.raises(ValueError, match=r"^interactions: ratings must be collected, got a LikePolars$"):
        interactions_of(frame)
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"user": ["a", "b"], "item": [1, 2], "timestamp": ["2001-01-01", "2001-01-02"]})
    assert interactions_of(frame).timestamps.tolist() == [978307200, 978393600]
