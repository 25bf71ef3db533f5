"""Boxes and masks that people drew: Pascal VOC's XML, a file for each image, and COCO's JSON, one for all.

An object that cannot be understood is left out and named. XML comes from anywhere, so a document that
defines entities, with which a small file can grow without end, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np


@dataclass
class Annotated:
    """An image with its objects.

    Args:
        path: of the image file.
        size: its width and height.
        boxes: (N, 5) float32 of x0, y0, x1, y1 and label, in pixels, with x1 and y1 behind the last.
        outlines: for each object its polygons, each (K, 2) of x and y, or a run-length code; empty where it
            has a box only.
        crowd: (N,) bool, whether a box holds many objects or one too hard to find, which no detector must
            answer for.
        mask: a file with the class of every pixel, as VOC has it, which goes before the outlines.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    outlines: list[list[np.ndarray] | dict]
    crowd: np.ndarray
    mask: Path | None = None


@dataclass
class Annotations:
    """Annotated images, the names of the classes, and what was left out and why."""

    images: list[Annotated]
    classes: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def read_voc(folder: str | Path, classes: tuple[str, ...] | None = None) -> Annotations:
    """Reads Pascal VOC annotations.

    Args:
        folder: has Annotations/*.xml, JPEGImages/ and perhaps masks in SegmentationClass/*.png, or XML files
            beside their images.
        classes: their names in the order of the labels; without them all that occur, sorted. Objects of other
            classes are left out.

    Raises:
        ValueError: there are no such files.
    """
    folder = Path(folder)
    files = sorted((folder / "Annotations").glob("*.xml")) or sorted(folder.glob("*.xml"))
    if not files:
        raise ValueError(f"annotations: {folder} must hold XML files, got none")
    skipped: dict[str, str] = {}
    found = []
    for file in files:
        try:
            found.append(_voc_image(file, skipped))
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
            skipped[str(file)] = str(error)
    names = classes or tuple(sorted({name for *_, objects in found for name, _, _ in objects}))
    images = []
    for path, mask, size, objects in found:
        kept = [item for item in objects if item[0] in names]
        boxes = [(*box, names.index(name)) for name, box, _ in kept]
        crowd = [hard for _, _, hard in kept]
        images.append(_annotated(path, size, boxes, [[] for _ in kept], crowd))
        images[-1].mask = mask if mask.is_file() else None
    return Annotations(images, names, skipped)


def _voc_image(file: Path, skipped: dict[str, str]) -> tuple[Path, Path, tuple[int, int], list]:
    content = file.read_bytes()
    if b"<!ENTITY" in content:
        raise ValueError("defines entities")
    root = ElementTree.fromstring(content)
    width, height = (_number(root, f"size/{name}") for name in ("width", "height"))
    name = root.findtext("filename") or f"{file.stem}.jpg"
    folder = file.parent.parent / "JPEGImages" if file.parent.name == "Annotations" else file.parent
    objects = []
    for index, item in enumerate(root.iter("object")):
        try:
            corners = [_number(item, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
            # VOC counts pixels from 1, and its last corner is the last pixel within.
            box = _clipped((corners[0] - 1, corners[1] - 1, corners[2], corners[3]), (width, height))
            hard = (item.findtext("difficult") or "0").strip() == "1"
            kind = (item.findtext("name") or "").strip()
            if not kind:
                raise ValueError("has no name")
            objects.append((kind, box, hard))
        except ValueError as error:
            skipped[f"{file}: object {index + 1}"] = str(error)
    mask = file.parent.parent / "SegmentationClass" / f"{file.stem}.png"
    return folder / Path(name).name, mask, (int(width), int(height)), objects


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"has no {path}")
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{path} is {value}")
    return value


def _clipped(box: tuple[float, ...], size: tuple[float, float]) -> tuple[float, ...]:
    x0, y0, x1, y1 = box
    if not np.isfinite(box).all():
        raise ValueError(f"a box must be finite, got {box}")
    x0, x1 = max(0.0, x0), min(float(size[0]), x1)
    y0, y1 = max(0.0, y0), min(float(size[1]), y1)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"a box within the image must have an area, got {box}")
    return x0, y0, x1, y1


def _annotated(path: Path, size: tuple[int, int], boxes: list, outlines: list, crowd: list) -> Annotated:
    table = np.array(boxes, np.float32).reshape(-1, 5)
    return Annotated(path, size, table, outlines, np.array(crowd, bool))


def read_coco(file: str | Path, images: str | Path) -> Annotations:
    """Reads COCO annotations. Labels are the places of the categories, sorted by their ids.

    Args:
        file: the JSON.
        images: the folder of the image files.

    Raises:
        ValueError: the file is no such JSON.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        categories = sorted((item["id"], _typed(item, "name", str)) for item in content["categories"])
        sides = ("width", "height")
        entries = [
            (item["id"], (_typed(item, "file_name", str), *(_pixels(item, side) for side in sides)))
            for item in content["images"]
        ]
        described = dict(entries)
        objects = _typed(content, "annotations", list)
        if len(dict(categories)) < len(categories):
            raise ValueError("two categories of one id")
        if any(described[number] != entry for number, entry in entries):
            raise ValueError("two images of one id")
    except OSError as error:
        raise ValueError(f"annotations: {file} must be readable, got {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"annotations: {file} must be COCO's JSON, got {error!r:.120}") from error
    labels = {number: label for label, (number, _) in enumerate(categories)}
    skipped: dict[str, str] = {}
    by_image: dict[int, list] = {number: [] for number in described}
    for place, item in enumerate(objects):
        try:
            x, y, width, height = map(float, item["bbox"])
            size = described[item["image_id"]][1:]
            box = _clipped((x, y, x + width, y + height), size)
            entry = (
                (*box, labels[item["category_id"]]),
                _outline(item.get("segmentation")),
                bool(int(item.get("iscrowd") or 0)),
            )
            by_image[item["image_id"]].append(entry)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            why = f"has no or an unknown {error}" if isinstance(error, KeyError) else str(error)
            skipped[f"{file}: annotation {item.get('id', place) if isinstance(item, dict) else place}"] = why
    found = []
    for number, (name, width, height) in described.items():
        boxes, outlines, crowd = (
            map(list, zip(*by_image[number], strict=True)) if by_image[number] else ([], [], [])
        )
        found.append(_annotated(Path(images) / name, (width, height), boxes, outlines, crowd))
    return Annotations(found, tuple(name for _, name in categories), skipped)


def _typed(item: dict, name: str, kinds: type | tuple[type, ...]):
    if not isinstance(item[name], kinds):
        raise TypeError(f"{name} of {type(item[name]).__name__}")
    return item[name]


def _pixels(item: dict, name: str) -> int:
    number = _typed(item, name, (int, float))
    if not float(number).is_integer():
        raise ValueError(f"{name} is {number}")
    return int(number)  # some tools write 640.0


def _outline(segmentation: list | dict | None) -> list[np.ndarray] | dict:
    if isinstance(segmentation, dict):
        return segmentation
    outline = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in segmentation or []]
    if any(len(polygon) < 3 or not np.isfinite(polygon).all() for polygon in outline):
        raise ValueError("a polygon must have three points or more, all of them finite")
    return outline


def mask_of(image: Annotated) -> np.ndarray:
    """Returns the class of every pixel, 0 for the background and 1 + label for an object; later ones cover.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: a run-length code does not fill the image.
    """
    from PIL import Image, ImageDraw

    width, height = image.size
    mask = np.zeros((height, width), np.uint8)
    for box, outline in zip(image.boxes, image.outlines, strict=True):
        if isinstance(outline, dict):
            inside = _run_lengths(outline, mask.shape)
        else:
            drawn = Image.new("1", (width, height))
            for polygon in outline:
                ImageDraw.Draw(drawn).polygon([tuple(point) for point in polygon], fill=1)
            inside = np.asarray(drawn)
        mask[inside] = 1 + int(box[4])
    return mask


def _run_lengths(code: dict, shape: tuple[int, int]) -> np.ndarray:
    """Decodes COCO's run lengths: of pixels outside and inside in turn, column after column."""
    try:
        height, width = map(int, code["size"])
        counts = code["counts"]
        lengths = [int(n) for n in (_unpacked(counts) if isinstance(counts, str) else counts)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"annotations: run lengths must have a size and counts, got {error!r:.120}"
        ) from error
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(f"annotations: run lengths must fill {height} x {width} pixels, got {sum(lengths)}")
    if (height, width) != shape:
        raise ValueError(f"annotations: a mask must have the shape {shape}, got {(height, width)}")
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return inside.reshape(width, height).T


def _unpacked(text: str) -> Iterator[int]:
    """Yields the run lengths in COCO's compressed text.

    A character has 5 bits, the lowest first; from the fourth length on stands the difference to the one
    before the last.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text.encode():
        part = character - 48
        value |= (part & 31) << shift
        shift += 5
        if part & 32:  # more follows
            continue
        if part & 16:  # a negative number
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        yield value
        value = shift = 0
