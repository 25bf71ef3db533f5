"""From what a classifier of images gives to what a person sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lspm_models.data.images import ImageData
from lspm_models.files import replaced
from lspm_models.tasks.classification import Classification

MOST_MISTAKES = 40
MOST_DRAWN = 4000  # classes of a confusion matrix, which has more cells than the picture has pixels
MOST_NAMES = 40  # beyond, the numbers in a confusion matrix cannot be read


def most_probable(logits: Tensor, classes: Sequence[str], count: int = 5) -> list[list[tuple[str, float]]]:
    """Returns for each image its most probable labels with their probabilities, the best first.

    Args:
        logits: (N, C).
        classes: the C names.
        count: labels per image at most.
    """
    values, indices = logits.float().softmax(1).topk(min(count, len(classes)), dim=1)
    return [
        [(classes[index], value) for value, index in zip(row, places, strict=True)]
        for row, places in zip(values.tolist(), indices.tolist(), strict=True)
    ]


@dataclass
class Predictions:
    """What a classifier says of images set aside, and the images where it was most wrongly sure.

    Args:
        probabilities: (N, C).
        labels: (N,) int64.
        mistakes: (K, C, H, W) in 0 to 1.
        places: (K,) where the mistakes stand among the N, those given the highest probability first.
        plain_accuracy: the accuracy without mirror images.
    """

    probabilities: Tensor
    labels: Tensor
    mistakes: Tensor
    places: Tensor
    plain_accuracy: float

    @property
    def predicted(self) -> Tensor:
        """The most probable classes, (N,)."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The share of images whose most probable class is right."""
        return (self.predicted == self.labels).double().mean().item()


@torch.no_grad()
def predict(task: Classification, data: ImageData, most: int = MOST_MISTAKES) -> Predictions:
    """Classifies all images set aside that can be read.

    A task that has learned from mirror images sees each of these in the mirror too, and its probabilities are
    the mean of both.

    Args:
        task: a trained one; it is left in eval mode.
        data: what it was trained with.
        most: mistakes to keep the images of.

    Raises:
        ValueError: there are none.
    """
    task.eval()
    device = next(task.parameters()).device
    probabilities, labels, count, right = [], [], 0, 0
    mistakes = places = confidences = None
    for images, targets in data.all_held_out():
        given = task(images.to(device)).float().softmax(1).cpu()
        right += int((given.argmax(1) == targets).sum())
        if data.mirrored:
            given = (given + task(images.flip(3).to(device)).float().softmax(1).cpu()) / 2
        confidence, predicted = given.max(1)
        wrong = (predicted != targets).nonzero()[:, 0]
        found = [data.look.shown(images[wrong]), wrong + count, confidence[wrong]]
        if mistakes is not None:
            found = [torch.cat(pair) for pair in zip((mistakes, places, confidences), found, strict=True)]
        order = found[2].argsort(descending=True, stable=True)[:most]
        mistakes, places, confidences = (part[order] for part in found)
        probabilities.append(given)
        labels.append(targets)
        count += len(targets)
    if not count:
        raise ValueError("predict: images must be set aside, got none that can be read")
    return Predictions(torch.cat(probabilities), torch.cat(labels), mistakes, places, right / count)


def report_classes(
    task: Classification, data: ImageData, folder: Path, report: Callable[[str], None]
) -> None:
    """Classifies the images set aside, says how well, and draws confusion.png and mistakes.png.

    Args:
        task: a trained one; it is left in eval mode.
        data: what it was trained with.
        folder: the run folder.
        report: takes lines for the reader.
    """
    found, classes = predict(task, data), data.look.classes
    wrong, count = int((found.predicted != found.labels).sum()), len(found.labels)
    mirror = f", each seen with its mirror image; {found.plain_accuracy:.2%} without" if data.mirrored else ""
    report(f"accuracy   {found.accuracy:.2%} of {count:,} images set aside, {wrong:,} wrong{mirror}")
    draw_mistakes(found, classes, folder / "mistakes.png")
    if len(classes) > MOST_DRAWN:
        report(f"pictures   {folder}/mistakes.png; no confusion.png of {len(classes):,} classes")
        return
    draw_confusion(confusion(found.predicted, found.labels, len(classes)), classes, folder / "confusion.png")
    report(f"pictures   {folder}/confusion.png, mistakes.png")


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns (C, C) counts: rows are true classes, columns predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def draw_confusion(counts: Tensor, classes: Sequence[str], image: Path) -> None:
    """Draws a confusion matrix: colours are shares of the true class, numbers are counts.

    Args:
        counts: (C, C), as confusion() gives them.
        classes: the C names.
        image: the PNG to write.
    """
    size = min(16.0, 3 + 0.55 * len(classes))
    figure, axes = _figure((size + 1, size))
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= MOST_NAMES:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in counts.nonzero().tolist():
            ink = "white" if shares[row, column] > 0.5 else "black"
            number = f"{int(counts[row, column])}"
            axes.text(column, row, number, ha="center", va="center", color=ink, fontsize=8)
    axes.set_title(f"{int(counts.diagonal().sum()):,} of {int(counts.sum()):,} right")
    _write(figure, image)


def draw_mistakes(found: Predictions, classes: Sequence[str], image: Path, columns: int = 8) -> None:
    """Draws the images that were misclassified with the greatest confidence, and what they are.

    Args:
        found: as predict() gives it.
        classes: their names.
        image: the PNG to write.
        columns: images side by side.
    """
    rows = max(1, -(-len(found.places) // columns))
    figure, axes = _figure((1.5 * columns, 1.9 * rows), rows, columns)
    for cell in axes.flat:
        cell.axis("off")
    wrong = zip(axes.flat, found.mistakes, found.places.tolist(), strict=False)
    for cell, pixels, place in wrong:
        cell.imshow(pixels.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        predicted, label = int(found.predicted[place]), int(found.labels[place])
        probability = found.probabilities[place, predicted].item()
        cell.set_title(f"{classes[predicted]} {probability:.0%}\nis {classes[label]}", fontsize=8)
    _write(figure, image)


def _figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _write(figure: Any, image: Path) -> None:
    with replaced(image) as partial:
        figure.savefig(partial, dpi=110, format="png")
