"""The notebooks of examples/ run as scripts, on what is there and on what they make up where it is not."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from lspm_models.data import image_files

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def run_(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name))
        return capsys.readouterr().out

    return run_


def test_accelerate_hugging_face(run):
    tiny = ["--width", "64", "--layers", "1", "--tokens", "16", "--vocabulary", "300", "--rounds", "1"]
    said = run("accelerate_hugging_face.py", *tiny)
    assert "attention, by transformers' interface" in said and "relative errors" in said
    assert said.count("times as fast") == 2 and said.endswith("the same bits as before\n")


def test_train_resnet_without_the_data(run, monkeypatch, tmp_path):
    monkeypatch.setattr(image_files, "FASHION", tmp_path / "missing")
    said = run("train_resnet_fashion_mnist.py", "--steps", "2", "--batch-size", "8", "--test-images", "16")
    assert "install it with: apt install dataset-fashion-mnist\nInstead, stripes in ten" in said
    assert "stripes: 20,000 pictures" in said and "of 16 pictures" in said


def test_train_resnet_with_data(run, monkeypatch):
    random = np.random.default_rng(0)
    images = [random.integers(256, size=(n, 1, 28, 28), dtype=np.uint8) for n in (32, 16)]
    parts = [image_files.Images(np.arange(len(pixels)) % 10, pixels) for pixels in images]
    clothes = image_files.Dataset("fashion-mnist", *parts, image_files.FASHION_CLASSES)
    monkeypatch.setitem(image_files.NAMED, "fashion-mnist", lambda: clothes)
    said = run("train_resnet_fashion_mnist.py", "--steps", "1", "--batch-size", "8", "--width", "4")
    assert said.startswith("fashion-mnist: 32 pictures to learn from, 16 to test on\n")
    assert "of 16 pictures" in said and "stripes" not in said


def test_recommend_movies(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "recbole", None)  # not installed, whatever is
    said = run("recommend_movies.py", "--epochs", "3")
    assert "pip install --no-deps recbole\nInstead, ratings of films" in said and "for a newcomer:" in said
    path = tmp_path / "own.csv"
    rows = [f"{user},{film},{1 + (user + film) % 5}" for user in range(20) for film in range(12)]
    path.write_text("\n".join(["user,item,rating", *rows]) + "\n")
    said = run("recommend_movies.py", "--epochs", "3", "--factors", "4", "--data", str(path))
    assert said.startswith("240 ratings of 12 films by 20 people") and "Instead" not in said
    with pytest.raises(
        ValueError, match=r"ratings: .* must be a file, a folder or ml-100k, got no such path"
    ):
        run("recommend_movies.py", "--data", str(tmp_path / "none.csv"))
