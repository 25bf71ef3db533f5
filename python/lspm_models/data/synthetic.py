"""Scenes made up as they are asked for: digits pasted on textured backgrounds, with exact masks and boxes."""

from __future__ import annotations

import hashlib

import numpy as np

from lspm_models.data.image_formats import Images

INK = 64  # a pixel of a digit that is darker counts as its background
PLACES = 20  # tries to find room for a digit before it is left out


class Scenes:
    """Scenes by number: the same number gives the same scene, on any machine.

    Args:
        images: grey images, bright on black, that are pasted; their labels name them.
        size: pixels on a side.
        most: objects in a scene; there are one to so many.
        seed: of the scenes.

    Raises:
        ValueError: the images are not grey, not in memory, or larger than a scene.
    """

    def __init__(self, images: Images, size: int, *, most: int = 4, seed: int = 0) -> None:
        shape = None if images.pixels is None else images.pixels.shape[1:]
        if shape is None or shape[0] != 1 or max(shape[1:]) > size:
            raise ValueError(f"scenes: images must be grey and fit into {size} pixels, got {shape}")
        self._images, self._size, self._most, self._seed = images, size, most, seed

    def fingerprint(self) -> str:
        """Returns a hash of what the scenes are made from."""
        recipe = repr((self._size, self._most, self._seed)).encode()
        return hashlib.blake2b(self._images.fingerprint() + recipe, digest_size=16).hexdigest()

    def scene(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns a scene.

        Returns:
            Its pixels (3, size, size) uint8; its mask (size, size) uint8, 0 for the background and 1 + label
            for an object; its boxes (N, 5) float32, of x0, y0, x1, y1 and label, around the pixels of each
            object, with x1 and y1 behind the last.
        """
        generator = np.random.default_rng([self._seed, number])
        pixels, mask = _texture(generator, self._size), np.zeros((self._size, self._size), np.uint8)
        boxes: list[tuple[int, int, int, int, int]] = []
        for _ in range(generator.integers(1, self._most + 1)):
            index = int(generator.integers(len(self._images)))
            digit, label = _trimmed(self._images.pixels[index, 0], generator), int(self._images.labels[index])
            place = self._place(generator, digit.shape, boxes)
            if place is None:
                continue
            (y, x), (height, width) = place, digit.shape
            spot, ink = (slice(y, y + height), slice(x, x + width)), digit >= INK
            colour = _contrast(generator, pixels[(slice(None), *spot)])
            strength = np.where(ink, digit / 255.0, 0.0)
            blended = pixels[(slice(None), *spot)] * (1 - strength) + colour[:, None, None] * strength
            pixels[(slice(None), *spot)] = blended.round()
            mask[spot][ink] = 1 + label
            boxes.append((x, y, x + width, y + height, label))
        return pixels, mask, np.array(boxes, np.float32).reshape(-1, 5)

    def _place(
        self, generator: np.random.Generator, shape: tuple[int, int], boxes: list
    ) -> tuple[int, int] | None:
        """Returns a place where an object hides no other."""
        height, width = shape
        if max(shape) > self._size:
            return None
        for _ in range(PLACES):
            y = int(generator.integers(self._size - height + 1))
            x = int(generator.integers(self._size - width + 1))
            apart = (x >= b[2] or b[0] >= x + width or y >= b[3] or b[1] >= y + height for b in boxes)
            if all(apart):
                return y, x
        return None


def _texture(generator: np.random.Generator, size: int) -> np.ndarray:
    """Returns coloured noise, coarse and fine, (3, size, size) uint8."""
    total = np.zeros((3, size, size))
    for cells in (2, 5, 16):
        # Each cell becomes a square of pixels; the fine ones are the weakest.
        coarse = generator.normal(size=(3, cells, cells)) * 40 / cells**0.5
        places = np.arange(size) * cells // size
        total += coarse[:, places[:, None], places]
    return (total + generator.uniform(40, 215, size=(3, 1, 1))).clip(0, 255).astype(np.uint8)


def _trimmed(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the part of a digit that has ink, at up to twice its size."""
    scale = generator.uniform(0.8, 2.0)
    ink = digit >= INK
    if not ink.any():
        return np.full((1, 1), 255, np.uint8)
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    part = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    places = [
        (np.arange(max(1, round(length * scale))) / scale).astype(np.int64).clip(max=length - 1)
        for length in part.shape
    ]
    part = part[places[0][:, None], places[1]]
    ink = part >= INK  # a small digit may have lost its outermost rows
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    if not len(rows):
        return np.full((1, 1), 255, np.uint8)
    return part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _contrast(generator: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Returns a colour (3,) that can be told from what it covers."""
    mean = under.mean((1, 2))
    colour = np.where(mean > 127, generator.uniform(0, 60, 3), generator.uniform(195, 255, 3))
    return np.where(np.abs(colour - mean) < 80, 255 - colour, colour)
