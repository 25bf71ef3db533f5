"""Images that people drew boxes and masks on, as scenes by number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lspm_models.data.annotations import Annotated, Annotations, mask_of
from lspm_models.data.image_files import DAMAGED, eight_bits, reason

BROKEN = (*DAMAGED, Image.DecompressionBombError)
UNCOUNTED = 255  # in a mask: no class; VOC has it at the edges of objects
PADDING = 127  # the colour below and beside an image that is not square


class DrawnScenes:
    """Annotated images by number, in one format; tells of each that cannot be read, once.

    Args:
        images: annotated ones.
        size: pixels on a side; images keep their shape, and what they leave of the square is grey.
        classes: how many.
        masks: whether scenes have masks, of outlines or mask files.
        seed: of the order, anew in each epoch; an image that cannot be read gives its place to the next.
            None: the images in order, each once.
        flip: whether half of them are mirrored.
        report: takes lines for the reader.
    """

    def __init__(
        self,
        images: list[Annotated],
        size: int,
        classes: int,
        *,
        masks: bool,
        seed: int | None = None,
        flip: bool = False,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._images, self._size, self._classes, self._masks = images, size, classes, masks
        self._seed, self._flip, self._report = seed, flip, report
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        """Returns a hash of the annotations, and of the files' names and sizes."""
        digest = hashlib.blake2b(repr((self._size, self._seed, self._flip)).encode(), digest_size=16)
        for image in self._images:
            digest.update(b"\0%b\0%d" % (os.fsencode(image.path.name), image.path.stat().st_size))
            digest.update(image.boxes.tobytes() + image.crowd.tobytes())
            for outline in image.outlines:
                parts = (
                    [repr(outline).encode()]
                    if isinstance(outline, dict)
                    else map(np.ndarray.tobytes, outline)
                )
                digest.update(b"\0".join(parts))
            if image.mask is not None:
                digest.update(f"\0{image.mask.stat().st_size}".encode())
        return digest.hexdigest()

    def scene(self, number: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray] | None:
        """Returns a scene, or None where there is none.

        Returns:
            Its pixels (3, size, size) uint8; its mask (size, size) uint8, 0 for the background, 1 + label for
            an object and 255 where a pixel does not count; its boxes (N, 5) float32 of x0, y0, x1, y1 and
            label, the label -2 - label where no detector must answer for the box.

        Raises:
            ValueError: none of all images can be read.
        """
        if self._seed is None:
            found = self._read(number)
            return None if isinstance(found, str) else found
        for place in range(number, number + len(self)):
            found = self._read(self._index(place))
            if not isinstance(found, str):
                generator = np.random.default_rng([self._seed, 1, number])
                return _mirrored(*found) if self._flip and generator.random() < 0.5 else found
        raise ValueError(f"images: one must be readable, got none of {len(self)}; {found}")

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self))
        return int(self._order[offset])

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray] | str:
        if index in self.skipped:
            return self.skipped[index]
        image = self._images[index]
        try:
            photo, mask = read_photo(image.path, image.size), None
            if self._masks:
                mask = fitted(_mask(image, self._classes), self._size, UNCOUNTED, Image.Resampling.NEAREST)
        except BROKEN as error:
            why = reason(error, image.path)
            self.skipped[index] = why
            self._report(f"skipped    {image.path}: {why} (image {len(self.skipped)} left out)")
            return why
        boxes = image.boxes.copy()
        boxes[:, :4] *= np.tile(np.divide(fitted_size(image.size, self._size), image.size), 2)
        boxes[image.crowd, 4] = -2 - boxes[image.crowd, 4]
        pixels = np.asarray(fitted(photo, self._size, (PADDING,) * 3, Image.Resampling.BILINEAR))
        return pixels.transpose(2, 0, 1), None if mask is None else np.asarray(mask), boxes


def _mirrored(pixels: np.ndarray, mask: np.ndarray | None, boxes: np.ndarray) -> tuple:
    boxes = boxes.copy()
    boxes[:, [0, 2]] = pixels.shape[2] - boxes[:, [2, 0]]
    return pixels[:, :, ::-1], None if mask is None else mask[:, ::-1], boxes


def _mask(image: Annotated, classes: int) -> Image.Image:
    if image.mask is None:
        return Image.fromarray(mask_of(image))
    with Image.open(image.mask) as file:
        if file.mode not in ("P", "L") or file.size != image.size:
            got = f"{file.size[0]} x {file.size[1]} {file.mode}"
            raise ValueError(f"its mask must be {image.size[0]} x {image.size[1]} P or L, got {got}")
        mask = np.asarray(file)
    if (mask == UNCOUNTED).all():  # the mean loss of no pixel is not a number
        raise ValueError(f"its mask must have a pixel that counts, got {UNCOUNTED} everywhere")
    if (wrong := mask[(mask > classes) & (mask < UNCOUNTED)]).size:
        raise ValueError(f"its mask must have values to {classes}, one for each class, got {wrong.max()}")
    return Image.fromarray(mask)


def read_photo(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Returns an image in colours, upright as the camera was, or as it lies in the file if `size` says so."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        chosen = image if size not in (None, upright.size) else upright
        return eight_bits(chosen, image.format).convert("RGB")


def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Returns width and height with the longer one of `side` pixels."""
    return tuple(max(1, round(length * side / max(size))) for length in size)


def fitted(image: Image.Image, side: int, fill: int | tuple, how: Image.Resampling) -> Image.Image:
    """Returns an image in the upper left of a square, its longer side as long as the square's."""
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image.resize(fitted_size(image.size, side), how))
    return square


def agreeing(found: Annotations, *, masks: bool) -> list[Annotated]:
    """Returns the images that are there, by their files' first bytes; the others become `skipped`.

    Args:
        found: annotations.
        masks: whether every object must have an outline or a mask.

    Raises:
        ValueError: an annotation says another size than its image has, there are no objects, or boxes only
            or too many classes where masks are wanted, or no image is left.
    """
    kept, drawn = [], any(image.mask is not None for image in found.images)
    if not (masks and drawn) and not any(len(image.boxes) for image in found.images):
        of = f" of {', '.join(found.classes)}" if found.classes else ""
        raise ValueError(f"annotations: objects{of} must be there to learn from, got none{_first(found)}")
    if masks and len(found.classes) >= UNCOUNTED:  # a pixel of a mask is a byte
        raise ValueError(
            f"annotations: classes must be fewer than {UNCOUNTED} for masks, got {len(found.classes)}"
        )
    if masks and not drawn and not any(any(map(len, image.outlines)) for image in found.images):
        raise ValueError("annotations: objects must have outlines or masks to learn from, got boxes only")
    for image in found.images:
        try:
            with Image.open(image.path) as file:
                size = file.size
                if size != image.size and file.getexif().get(ExifTags.Base.Orientation, 1) > 4:
                    size = size[::-1]
        except FileNotFoundError:
            found.skipped[str(image.path)] = "no such file"
            continue
        except BROKEN as error:
            found.skipped[str(image.path)] = reason(error, image.path)
            continue
        if size != image.size:
            wanted, got = (" x ".join(map(str, sides)) for sides in (image.size, size))
            raise ValueError(
                f"annotations: {image.path} must be as large as its annotation says, {wanted}, got {got}"
            )
        if masks and not (image.mask if drawn else all(map(len, image.outlines))):
            found.skipped[str(image.path)] = "has boxes without masks"
            continue
        kept.append(image)
    if not kept:
        raise ValueError(f"annotations: an image must be usable, got none{_first(found)}")
    return kept


def _first(found: Annotations) -> str:
    return next((f": {name} ({why})" for name, why in found.skipped.items()), "")
