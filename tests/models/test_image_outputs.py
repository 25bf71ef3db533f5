"""What a person sees of a classifier: labels with probabilities, the confusion matrix, the mistakes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lspm_models import image_outputs
from lspm_models.data.image_config import ImageFormat
from lspm_models.image_outputs import Predictions, confusion, draw_confusion, most_probable


def test_labels_with_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    found = most_probable(logits, "abc", 2)
    assert [[label for label, _ in row] for row in found] == [["b", "c"], ["a", "b"]]
    assert found[0][0][1] == pytest.approx(logits[0].softmax(0)[1].item())
    assert len(most_probable(logits, "abc", 9)[0]) == 3


def test_the_confusion_matrix_has_true_classes_in_rows(tmp_path):
    counts = confusion(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 2]), 3)
    assert counts.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    draw_confusion(counts, "abc", tmp_path / "a.png")
    draw_confusion(torch.eye(50, dtype=torch.int64), list(map(str, range(50))), tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(8, 48, 107), (247, 251, 255)} <= colours  # the two ends of the scale


def test_of_very_many_classes_no_matrix_is_drawn(tmp_path, monkeypatch):
    lines, found = [], Predictions(torch.eye(3), torch.arange(3), torch.zeros(0), torch.arange(0), 1.0)
    data = SimpleNamespace(look=ImageFormat(tuple("abc"), 1, 8, (0.0,), (1.0,)), mirrored=False)
    monkeypatch.setattr(image_outputs, "predict", lambda task, data: found)
    monkeypatch.setattr(image_outputs, "MOST_DRAWN", 2)
    image_outputs.report_classes(None, data, tmp_path, lines.append)
    assert lines[1:] == [f"pictures   {tmp_path}/mistakes.png; no confusion.png of 3 classes"]
    assert [path.name for path in tmp_path.iterdir()] == ["mistakes.png"]
