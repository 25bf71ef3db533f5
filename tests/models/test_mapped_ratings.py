"""Ratings on disk: the same order and the same bits as in memory."""

import pytest
import torch

import lspm_kernels as lk
from lspm_models.data.mapped_ratings import open_ratings, write_ratings


def drawn(count=3000):
    return torch.randint(70, (count,)), torch.randint(50, (count,)), torch.rand(count), torch.rand(count)


@pytest.mark.parametrize("columns", [3, 4])
def test_training_from_disk_gives_the_bits_of_training_in_memory(tmp_path, columns):
    ratings = drawn()[:columns]
    batches = zip(*(t.split(700) for t in ratings), strict=True)
    on_disk = write_ratings(tmp_path / "ratings", batches)
    in_memory = lk.rating_blocks(*ratings)
    for name, value in vars(in_memory).items():
        other = getattr(on_disk, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
    tables = [torch.randn(70, 8), torch.randn(50, 8), torch.zeros(70), torch.zeros(50)]
    others = [t.clone() for t in tables]
    lk.mf_sgd_(*tables, in_memory, lr=0.05)
    lk.mf_sgd_(*others, open_ratings(tmp_path / "ratings"), lr=0.05)
    for a, b in zip(tables, others, strict=True):
        assert torch.equal(a, b)


def test_batches_of_arrays_and_lists(tmp_path):
    columns = drawn(20)
    for kind in ("numpy", "tolist", "requires_grad_"):
        batch = [
            t if kind == "requires_grad_" and n < 2 else getattr(t, kind)() for n, t in enumerate(columns)
        ]
        found = write_ratings(tmp_path / kind, [batch])
        assert found.ratings.sort().values.equal(columns[2].detach().sort().values)


def test_ratings_take_the_place_of_others_but_of_nothing_else(tmp_path):
    write_ratings(tmp_path / "ratings", [drawn()])
    assert len(write_ratings(tmp_path / "ratings", [drawn(10)])) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["ratings"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="must be new, empty or a folder of ratings, got other files"):
        write_ratings(tmp_path / "mine", [drawn()])
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold at least one rating, got none"),
        ([drawn()[:3], drawn()], "batches must all have 3 columns, got 4"),
        ([drawn()[:2]], "a batch must be 3 or 4 columns of one length"),
        ([(torch.tensor([2**31]), torch.tensor([0]), torch.tensor([1.0]))], "users must fit 32 bits"),
        ([(torch.tensor([0]), torch.tensor([1.5]), torch.tensor([1.0]))], "items must be integers"),
        ([([True], [1], [1.0])], "users must be integers, got torch.bool"),
        ([([[0]], [[1]], [[1.0]])], r"a batch must be 3 or 4 columns of one length, got \[\(1, 1\)"),
        ([(torch.tensor([-1]), torch.tensor([0]), torch.tensor([1.0]))], "users must be from 0 to"),
    ],
)
def test_misuse(tmp_path, batches, message):
    with pytest.raises(ValueError, match=message):
        write_ratings(tmp_path / "ratings", batches)
    assert not list(tmp_path.iterdir())  # nor what was written so far


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be there, got no such file"):
        open_ratings(tmp_path)
    write_ratings(tmp_path / "ratings", [drawn()])
    with (tmp_path / "ratings" / "items.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"items\.bin must have 12000 bytes, got 12004"):
        open_ratings(tmp_path / "ratings")
