"""From what a U-Net or a detector gives to what a person sees."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lspm_models.data.drawn import PADDING, fitted, fitted_size, read_photo
from lspm_models.data.image_config import ImageFormat
from lspm_models.data.scenes import SceneData
from lspm_models.files import write_atomically
from lspm_models.pictures import boxed, enlarged, page, tinted
from lspm_models.tasks.detection import Detection, Found
from lspm_models.tasks.segmentation import Segmentation

SHOWN = 12  # images on the page
FIXED = "\xa0"  # a space at which no line breaks
SCORE = 0.4  # detections below this are not drawn


@torch.no_grad()
def report_scenes(
    task: Segmentation | Detection, data: SceneData, folder: Path, report: Callable[[str], None]
) -> None:
    """Looks at all scenes set aside, says how well, class by class, and draws found.png.

    Args:
        task: a trained one; it is left in eval mode.
        data: what it was trained with.
        folder: the run folder; gets classes.csv and found.png.
        report: takes lines for the reader.

    Raises:
        ValueError: there are no scenes that can be read.
    """
    task.eval()
    device = next(task.parameters()).device
    sums, count, cells = torch.zeros(()), 0, []
    draw = _masks if isinstance(task, Segmentation) else _boxes
    for images, targets in data.all_held_out():
        _, measured = task.evaluate(images.to(device), targets.to(device))
        sums, count = sums + measured.double().cpu(), count + len(images)
        if (room := SHOWN - len(cells)) > 0:
            cells += draw(task, data.look, images[:room].to(device), targets[:room])
    if not count:
        raise ValueError("predict: images must be set aside, got none that can be read")
    classes, sums = data.look.classes, sums.tolist()
    metrics = task.metrics(sums)
    if isinstance(task, Segmentation):
        classes, name, values = ("background", *classes), "iou", task.ious(sums)
        right = f"; {metrics['pixel_accuracy']:.2%} of the pixels are right"
        report(f"mean IoU   {metrics['mean_iou']:.4f} of {count:,} images set aside{right}")
    else:
        name, values = "ap50", task.average_precisions(sums)
        report(f"AP50       {metrics['ap50']:.4f} of {count:,} images set aside")
    rows = list(zip(classes, values.tolist(), strict=True))
    words = [f"{label} {value:.3f}".replace(" ", FIXED) for label, value in rows]
    for line in textwrap.wrap("  ".join(words), 98):
        report(" " * 11 + line.replace(FIXED, " "))
    text = io.StringIO()
    csv.writer(text).writerows([("class", name), *rows])
    write_atomically(folder / "classes.csv", text.getvalue().encode())
    page([cell for row in cells for cell in row], 6 if len(cells[0]) > 1 else 4, folder / "found.png")
    report(f"pictures   {folder}/found.png; classes.csv has the figures of the classes")


def _photos(look: ImageFormat, images: Tensor) -> Iterator[Image.Image]:
    for pixels in (look.shown(images.cpu()) * 255).round().byte():
        yield Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _masks(task: Segmentation, look: ImageFormat, images: Tensor, targets: Tensor) -> list[list[tuple]]:
    """Returns for each image what is there and what is found."""
    rows = []
    predicted = task(images).argmax(1).cpu()
    for photo, *masks in zip(_photos(look, images), targets, predicted, strict=True):
        captions = [
            f"{what}: {_named(mask, look)}" for what, mask in zip(("true", "found"), masks, strict=True)
        ]
        masks[1] = masks[1].where(masks[0] >= 0, -1)
        shown = [enlarged(tinted(photo, mask.numpy()))[0] for mask in masks]
        rows.append(list(zip(shown, captions, strict=True)))
    return rows


def _named(mask: Tensor, look: ImageFormat) -> str:
    """Returns the names of the classes in a mask that cover more than 1 % of what is not background."""
    counts = torch.bincount(mask[mask > 0], minlength=2)
    labels = (counts > 0.01 * counts.sum()).nonzero()[:, 0].tolist()
    return ", ".join(look.classes[label - 1] for label in labels) or "nothing"


def _boxes(task: Detection, look: ImageFormat, images: Tensor, targets: Tensor) -> list[list[tuple]]:
    """Returns for each image what is found on it, with what is there in white."""
    rows = []
    for image, found, boxes in zip(_photos(look, images), task(images), targets, strict=True):
        photo, scale = enlarged(image)
        true = boxes[boxes[:, 4] >= 0]
        sure = above(found, SCORE)
        names = ", ".join(look.classes[int(label)] for label in sorted(true[:, 4].tolist())) or "nothing"
        drawn = boxed(
            photo, sure._replace(boxes=sure.boxes * scale), look.classes, true[:, :4].numpy() * scale
        )
        rows.append([(drawn, f"true: {names}")])
    return rows


def above(found: Found, score: float) -> Found:
    """Returns the detections of at least a score, on the CPU."""
    return Found(*(part[found.scores >= score].cpu() for part in found))


@torch.no_grad()
def look_at(
    task: Segmentation | Detection, look: ImageFormat, path: Path, score: float = SCORE
) -> tuple[str, Image.Image]:
    """Finds what an image file shows.

    Args:
        task: in eval mode.
        look: the format of its images.
        path: of the image file.
        score: the least of a detection.

    Returns:
        What was found in words, and the image with it drawn on.

    Raises:
        OSError, ValueError, ...: the file cannot be read; see drawn.BROKEN.
    """
    photo = read_photo(path)
    size = fitted_size(photo.size, look.size)
    square = np.asarray(fitted(photo, look.size, (PADDING,) * 3, Image.Resampling.BILINEAR))
    images = look.normalised(torch.from_numpy(square.transpose(2, 0, 1).copy())[None])
    images = images.to(next(task.parameters()).device)
    if isinstance(task, Segmentation):
        mask = task(images)[0, :, : size[1], : size[0]].argmax(0).cpu().numpy().astype(np.uint8)
        counts = np.bincount(mask.ravel(), minlength=task.classes)
        shares = [(counts[label], name) for label, name in enumerate(("background", *look.classes))]
        words = [
            f"{name} {count / mask.size:.1%}" for count, name in sorted(shares, key=lambda s: -s[0]) if count
        ]
        whole = Image.fromarray(mask).resize(photo.size, Image.Resampling.NEAREST)
        return "  ".join(words), tinted(photo, np.asarray(whole))
    found = above(task(images)[0], score)
    scale = torch.tensor(np.divide(photo.size, size), dtype=torch.float32).repeat(2)
    limit = torch.tensor(photo.size, dtype=torch.float32).repeat(2)
    found = found._replace(boxes=(found.boxes * scale).minimum(limit))
    words = [
        f"{look.classes[label]} {sure:.2f} at {' '.join(f'{side:.0f}' for side in box)}"
        for box, sure, label in zip(*(part.tolist() for part in found), strict=True)
    ]
    return "  ".join(words) or "nothing", boxed(photo, found, look.classes)
