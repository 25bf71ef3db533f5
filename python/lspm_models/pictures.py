"""What a U-Net or a detector finds, drawn on the image: colours over pixels, boxes with labels and scores."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lspm_models.files import replaced
from lspm_models.tasks.detection import Found

CELL = 288  # pixels of the longer side of an image on a page
STRIP = 22  # pixels above each for its caption
LETTERS = 40  # that fit above an image
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue; ITU-R BT.601


def colour(label: int) -> tuple[int, int, int]:
    """Returns the colour of a class; neighbours are steps of the golden ratio apart on the circle."""
    hue = label * 0.618034 % 1
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0 - 0.3 * (label // 5 % 2)))


def tinted(photo: Image.Image, mask: np.ndarray, strength: float = 0.65) -> Image.Image:
    """Returns an image with a colour over the pixels of each class.

    Args:
        photo: in colours.
        mask: (H, W) integers, 0 for the background, 1 + label for an object; below 0 stays as it is, too.
        strength: of the colours.
    """
    found = np.asarray(photo).astype(np.float64)
    for label in np.unique(mask[mask > 0]).tolist():
        inside = mask == label
        found[inside] = (1 - strength) * found[inside] + strength * np.array(colour(label - 1))
    return Image.fromarray(found.round().astype(np.uint8))


def boxed(
    photo: Image.Image, found: Found, classes: Sequence[str], true: np.ndarray | None = None
) -> Image.Image:
    """Returns an image with boxes, labels and scores on it.

    Args:
        photo: in colours.
        found: the objects, in pixels of the image.
        classes: the names.
        true: (M, 4) the boxes that are there, drawn in white below the others.
    """
    photo = photo.copy()
    draw, width = ImageDraw.Draw(photo), max(1, round(max(photo.size) / 200))
    font = ImageFont.load_default(max(12, max(photo.size) // 25))
    for box in [] if true is None else true.tolist():
        draw.rectangle(_outer(box, 2 * width), outline="white", width=width)
    for box, score, label in list(zip(*(part.tolist() for part in found), strict=True))[::-1]:
        draw.rectangle(_outer(box, width), outline=colour(label), width=width)
        text = f"{classes[label]} {score:.2f}"
        _, upper, right, lower = draw.textbbox((0, 0), text, font)
        x = max(0, min(box[0] - width, photo.width - right))
        y = box[1] - lower - 2 * width
        y = y if y >= 0 else min(box[3] + width, photo.height - lower)  # below, where there is no room above
        draw.rectangle((x, y + upper - 1, x + right, y + lower + 1), fill=colour(label))
        bright = np.dot(colour(label), LUMINANCE) > 110
        draw.text((x, y), text, "black" if bright else "white", font)
    return photo


def _outer(box: Sequence[float], by: int) -> tuple[float, ...]:
    return box[0] - by, box[1] - by, max(box[2], box[0]) + by - 1, max(box[3], box[1]) + by - 1


def enlarged(photo: Image.Image) -> tuple[Image.Image, float]:
    """Returns an image as large as a page shows it, and how many times it was enlarged."""
    scale = CELL / max(photo.size)
    size = tuple(max(1, round(length * scale)) for length in photo.size)
    return photo.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR), scale


def page(cells: Sequence[tuple[Image.Image, str]], columns: int, image: Path) -> None:
    """Writes a PNG of images with captions, row by row."""
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (CELL + 8), rows * (CELL + STRIP + 8)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (photo, caption) in enumerate(cells):
        x, y = place % columns * (CELL + 8) + 4, place // columns * (CELL + STRIP + 8) + 4
        draw.text((x, y), textwrap.shorten(caption, LETTERS, placeholder=" ..."), "black", font)
        sheet.paste(photo, (x, y + STRIP))
    save(sheet, image)


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with replaced(path) as partial:
        picture.save(partial, format="png")
