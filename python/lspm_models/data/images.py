"""Images for training: from labelled images to batches, shuffled anew in every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.augmentation import Augmentation
from lspm_models.data.image_config import FOLDER_SIZE, ImageConfig, ImageFormat, load_format
from lspm_models.data.image_files import Dataset, decode, open_images, resize
from lspm_models.data.image_formats import Images
from lspm_models.progress import counted

STATISTICS = 1000  # images that the mean and the deviation are taken from


class Reader:
    """Reads images in one format, files by several threads; tells of each that cannot be read, once.

    Args:
        images: what to read.
        channels: of the format.
        size: of the format.
        report: takes lines for the reader.
    """

    def __init__(
        self, images: Images, channels: int, size: int, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.images, self._channels, self._size, self._report = images, channels, size, report
        self.skipped: dict[int, str] = {}
        self._threads = ThreadPoolExecutor(torch.get_num_threads()) if len(images.paths) else None

    def batch(self, indices: np.ndarray, *, replace: bool) -> tuple[Tensor, Tensor]:
        """Reads images.

        Args:
            indices: of the images.
            replace: an image that cannot be read gives its place to the next that can; else it is left out.

        Returns:
            Pixels (N, channels, size, size) uint8, and labels (N,) int64.

        Raises:
            ValueError: none of all images can be read.
        """
        found, labels = [], []
        for index, read in zip(indices, self._map(self._read, indices), strict=True):
            if replace and isinstance(read, str):
                place, image = self._next(index, read)
            else:
                place, image = index, read
            if isinstance(image, str):
                self._skip(place, image)
                continue
            found.append(image)
            labels.append(self.images.labels[place])
        pixels = np.stack(found) if found else np.empty((0, self._channels, self._size, self._size), np.uint8)
        return torch.from_numpy(pixels), torch.from_numpy(np.array(labels, np.int64))

    def _next(self, index: int, why: str) -> tuple[int, np.ndarray]:
        """Returns the first image behind an unreadable one that can be read, and its place."""
        for place in range(index, index + len(self.images)):
            read = self._read(place % len(self.images))
            if isinstance(read, np.ndarray):
                return place % len(self.images), read
            self._skip(place % len(self.images), read)
        raise ValueError(f"images: one must be readable, got none of {len(self.images)}; {why}")

    def _map(self, function: Callable, items: np.ndarray) -> Iterator:
        return map(function, items) if self._threads is None else self._threads.map(function, items)

    def _read(self, index: int) -> np.ndarray | str:
        """Returns an image, or why it cannot be read."""
        if self.images.pixels is not None:
            return resize(self.images.pixels[index], self._channels, self._size)
        try:
            return decode(self.images.paths[index], self._channels, self._size)
        except ValueError as error:
            return str(error)

    def _skip(self, index: int, why: str) -> None:
        if index not in self.skipped:
            self.skipped[index] = why
            self._report(f"skipped    {self.images.paths[index]}: {why} (image {len(self.skipped)} left out)")


class ImageBatches:
    """Batches of augmented images; the whole state is how many images were drawn.

    The images stand in one endless row, a new permutation in every epoch, and every process takes its share
    of each piece of that row. Augmentation draws from PyTorch's generator, whose state fit() keeps.

    Args:
        reader: of the images.
        look: how pixels are normalised.
        batch_size: images per batch and process.
        augmentation: of a batch.
        seed: of the permutations.
        process: which share this process takes, of `processes`.
    """

    def __init__(
        self,
        reader: Reader,
        look: ImageFormat,
        batch_size: int,
        *,
        augmentation: Augmentation,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._reader, self._look, self._batch_size = reader, look, batch_size
        self._augmentation, self._seed = augmentation, seed
        self._process, self._processes = process, processes
        self._drawn, self._epoch, self._order = 0, -1, np.empty(0, np.int64)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns images (B, C, H, W) float32 and labels (B,) int64, or (B, classes) float32 where mixed."""
        first = self._drawn + self._process * self._batch_size
        indices = np.array([self._index(first + offset) for offset in range(self._batch_size)])
        self._drawn += self._processes * self._batch_size
        pixels, labels = self._reader.batch(indices, replace=True)
        images = self._look.normalised(self._augmentation.each(pixels))
        return self._augmentation.mixed(images, labels)

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._reader.images))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._reader.images))
        return int(self._order[offset])

    def state(self) -> dict:
        """Returns the place in the row of images, as JSON can hold it."""
        return {"drawn": self._drawn, "seed": self._seed}

    def restore(self, state: dict) -> None:
        """Continues exactly where state() was taken."""
        self._drawn, self._seed, self._epoch = state["drawn"], state["seed"], -1


class ImageData:
    """The training and validation images that fit() asks for.

    `mirrored` tells whether a mirror image is as good as the image.

    Args:
        training: images to learn from.
        held_out: images to validate on; may be none.
        look: the format of both.
        config: how training images vary.
        batch_size: images per batch and process.
        validation_batches: batches at most per evaluation.
        seed: of the order of training images.
        process: which share this process trains on, of `processes`.
        report: takes lines for the reader.
    """

    def __init__(
        self,
        training: Images,
        held_out: Images,
        look: ImageFormat,
        config: ImageConfig,
        batch_size: int,
        *,
        validation_batches: int = 16,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.mirrored = config.flip
        self.look, self.held_out = look, Reader(held_out, look.channels, look.size, report)
        self.training = ImageBatches(
            Reader(training, look.channels, look.size, report),
            look,
            batch_size,
            augmentation=Augmentation(config, look.size, len(look.classes)),
            seed=seed,
            process=process,
            processes=processes,
        )
        self.fingerprint = hashlib.blake2b(
            training.fingerprint() + held_out.fingerprint(), digest_size=16
        ).hexdigest()
        self._batch_size, self._most = batch_size, validation_batches * batch_size

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same evenly spread images every time."""
        return self._batches(min(self._most, len(self.held_out.images)))

    def all_held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image that was set aside, in order."""
        return self._batches(len(self.held_out.images))

    def _batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = np.linspace(0, len(self.held_out.images) - 1, count).astype(np.int64)
        for first in range(0, count, self._batch_size):
            pixels, labels = self.held_out.batch(chosen[first : first + self._batch_size], replace=False)
            if len(labels):
                yield self.look.normalised(pixels), labels


def set_aside(images: Images, share: float) -> tuple[Images, Images]:
    """Splits images into those to train on and the share of every class to validate on, evenly spread."""
    by_class = np.argsort(images.labels, kind="stable")
    place = np.concatenate([np.arange(count) for count in np.bincount(images.labels)]).astype(np.int64)
    # One of every 1 / share images; the small term keeps 10 * 0.1 and the like from falling below a whole.
    taken = np.floor((place + 1) * share + 1e-9) > np.floor(place * share + 1e-9)
    return images.subset(np.sort(by_class[~taken])), images.subset(np.sort(by_class[taken]))


def prepare_images(
    config: ImageConfig,
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
    like: ImageFormat | None = None,
) -> tuple[Images, Images, ImageFormat]:
    """Opens the images of a run, and makes its format or opens the one that its folder holds already.

    Args:
        config: which images.
        folder: the run folder; gets images.json.
        report: takes lines for the reader.
        like: the format of pretrained weights, whose pixels a new format shall have.

    Returns:
        The images to train on, those to validate on, and their format.

    Raises:
        ValueError: the images or an option are not usable; the message names them.
    """
    dataset = open_images(config.data)
    training, held_out = dataset.training, dataset.held_out
    if held_out is None:
        training, held_out = set_aside(training, config.validation)
    path = Path(folder) / "images.json"
    if path.exists():
        look = load_format(path)
        if look.classes != dataset.classes:
            raise ValueError(
                f"images: classes of {config.data} must be those of {path}, {', '.join(look.classes)}, "
                f"got {', '.join(dataset.classes)}"
            )
    else:
        if like is None:
            look = measure(config, dataset, training)
        else:
            look = replace(like, classes=dataset.classes, size=config.size or like.size)
        look.save(path)
    kind = f"{look.size} x {look.size} " + ("grey" if look.channels == 1 else "colour")
    counts = f"{len(training):,} to train on, {len(held_out):,} to validate on"
    if config.validation and not len(held_out):
        counts += f" (of no class a share of {config.validation:g} is an image)"
    report(f"images     {dataset.name}: {counts}, {counted(len(look.classes), 'class')}, {kind}")
    seen = np.bincount(training.labels, minlength=len(look.classes))
    if empty := [name for name, number in zip(look.classes, seen, strict=True) if not number]:
        report(f"empty      {counted(len(empty), 'class')} without an image to train on: {_some(empty)}")
    if dataset.skipped:
        count = sum(number for _, number in dataset.skipped.values())
        reasons = [f"{name} ({why})" for name, (why, _) in dataset.skipped.items()]
        report(f"skipped    {counted(count, 'image')} that cannot be read: {_some(reasons)}")
    return training, held_out, look


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def measure(config: ImageConfig, dataset: Dataset, training: Images) -> ImageFormat:
    """Returns the format that options or images ask for, with the mean and deviation of the pixels."""
    shape = None if training.pixels is None else training.pixels.shape[1:]
    channels = config.channels or (3 if shape is None else shape[0])
    size = config.size or (FOLDER_SIZE if shape is None else max(shape[1:]))
    chosen = np.linspace(0, len(training) - 1, min(STATISTICS, len(training))).astype(np.int64)
    pixels, _ = Reader(training, channels, size).batch(chosen, replace=False)
    if not len(pixels):
        raise ValueError(
            f"images: {config.data} must hold images that can be read, got none in {len(chosen)}"
        )
    values = pixels.double().div(255)
    mean, deviation = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
    deviation[deviation == 0] = 1.0  # a channel of one value says nothing
    return ImageFormat(
        dataset.classes,
        channels,
        size,
        tuple(round(value, 4) for value in mean.tolist()),
        tuple(round(value, 4) for value in deviation.tolist()),
    )
