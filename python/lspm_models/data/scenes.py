"""Scenes for fit(): pasted ones or annotated images, as batches with masks or boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.annotations import read_coco, read_voc
from lspm_models.data.drawn import UNCOUNTED, DrawnScenes, agreeing
from lspm_models.data.image_config import ImageFormat, load_format
from lspm_models.data.image_files import NAMED, open_images
from lspm_models.data.images import set_aside
from lspm_models.data.scene_config import FILE_SIZE, PASTED_SIZE, SceneConfig
from lspm_models.data.synthetic import Scenes
from lspm_models.progress import counted
from lspm_models.tasks.segmentation import IGNORE_INDEX

PASTED_HELD_OUT = 1000  # pasted scenes have no end; so many are looked at when training is over
NO_FORMAT = ImageFormat((), 3, PASTED_SIZE, (0.5,) * 3, (0.5,) * 3)  # pixels from -1 to 1


class Source(Protocol):
    """Scenes by number, as Scenes and DrawnScenes give them."""

    def scene(self, number: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray] | None:
        """Returns pixels, mask and boxes."""

    def fingerprint(self) -> str:
        """Returns a hash of what the scenes are made from."""


class SceneData:
    """Scenes for fit(): the next ones to train on, and the same ones to validate on.

    Args:
        training: scenes to train on.
        held_out: scenes to validate on, of other images.
        target: "mask", (B, size, size) int64 classes of pixels with 0 for the background and -100 where a
            pixel does not count, or "boxes", (B, N, 5) float32 of x0, y0, x1, y1 and label, -1 where a scene
            has fewer.
        batch_size: scenes per batch and process.
        look: how pixels are normalised.
        validation_batches: batches per evaluation.
        set_aside: scenes of held_out, from number 0; without it those of an evaluation.
        process: which share this process trains on, of `processes`.
    """

    def __init__(
        self,
        training: Source,
        held_out: Source,
        target: str,
        batch_size: int,
        *,
        look: ImageFormat = NO_FORMAT,
        validation_batches: int = 4,
        set_aside: int | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if target not in ("mask", "boxes"):
            raise ValueError(f"scenes: target must be one of mask, boxes, got {target!r}")
        self._scenes, self._held_out, self._target = training, held_out, target
        self._batch_size, self._most = batch_size, validation_batches * batch_size
        self._process, self._processes = process, processes
        self._drawn = 0
        self.look, self.set_aside = look, self._most if set_aside is None else set_aside
        self.training = self
        self.fingerprint = training.fingerprint() + held_out.fingerprint()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns images (B, 3, size, size) float32, normalised, and targets."""
        first = self._drawn + self._process * self._batch_size
        self._drawn += self._processes * self._batch_size
        return self._batch([self._scenes.scene(first + i) for i in range(self._batch_size)])

    def state(self) -> dict:
        """Returns how many scenes were drawn."""
        return {"drawn": self._drawn}

    def restore(self, state: dict) -> None:
        """Continues exactly where state() was taken."""
        self._drawn = state["drawn"]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same evenly spread scenes every time."""
        return self._batches(min(self._most, self.set_aside))

    def all_held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every scene that was set aside, in order."""
        return self._batches(self.set_aside)

    def _batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = np.linspace(0, self.set_aside - 1, count).astype(np.int64).tolist()
        for first in range(0, count, self._batch_size):
            found = map(self._held_out.scene, chosen[first : first + self._batch_size])
            if scenes := [scene for scene in found if scene is not None]:
                yield self._batch(scenes)

    def _batch(self, scenes: list[tuple]) -> tuple[Tensor, Tensor]:
        pixels, masks, boxes = zip(*scenes, strict=True)
        images = self.look.normalised(torch.from_numpy(np.stack(pixels)))
        if self._target == "boxes":
            return images, padded(boxes)
        targets = torch.from_numpy(np.stack(masks).astype(np.int64))
        return images, targets.where(targets != UNCOUNTED, IGNORE_INDEX)


def padded(boxes: list[np.ndarray]) -> Tensor:
    """Returns boxes of several images (N, 5) as one tensor (B, most, 5), with -1 where an image has fewer."""
    found = torch.full((len(boxes), max(map(len, boxes)), 5), -1.0)
    for row, part in zip(found, boxes, strict=True):
        row[: len(part)] = torch.from_numpy(np.asarray(part, np.float32))
    return found


def prepare_scenes(
    config: SceneConfig,
    target: str,
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
    like: ImageFormat = NO_FORMAT,
    *,
    seed: int = 0,
) -> tuple[Source, Source, int, ImageFormat]:
    """Opens the scenes of a run, and makes its format or opens the one that its folder holds already.

    Args:
        config: which scenes.
        target: "mask" or "boxes".
        folder: the run folder; gets images.json.
        report: takes lines for the reader.
        like: the format whose normalised pixels a new format shall have.
        seed: of the scenes to train on.

    Returns:
        The scenes to train on, those to validate on, how many these are, and their format.

    Raises:
        ValueError: the scenes or an option are not usable; the message names them.
    """
    if config.data in NAMED:
        *scenes, count, classes, size = _pasted(config, report, seed)
    else:
        *scenes, count, classes, size = _drawn(config, target, report, seed)
    path = Path(folder) / "images.json"
    look = replace(like, classes=classes, size=size)
    if path.exists():
        look = load_format(path)
        if look.classes != classes:
            raise ValueError(
                f"scenes: classes of {config.data} must be those of {path}, {', '.join(look.classes)}, "
                f"got {', '.join(classes)}"
            )
    else:
        look.save(path)
    return *scenes, count, look


def _pasted(config: SceneConfig, report: Callable[[str], None], seed: int) -> tuple:
    dataset, size = open_images(config.data), config.size or PASTED_SIZE
    parts = dataset.training, dataset.held_out
    if parts[1] is None:
        parts = set_aside(dataset.training, config.validation)
    # The held-out scenes are of other digits, and of a seed that no run trains with.
    scenes = [
        Scenes(part, size, most=config.most, seed=number)
        for part, number in zip(parts, (seed, 2**32 + 1), strict=True)
    ]
    counts = f"{len(parts[0]):,} to train with, {len(parts[1]):,} to validate with"
    report(
        f"scenes     {dataset.name} on textures: {counts}, {len(dataset.classes)} classes, {size} x {size}"
    )
    return *scenes, PASTED_HELD_OUT, dataset.classes, size


def _drawn(config: SceneConfig, target: str, report: Callable[[str], None], seed: int) -> tuple:
    path, size = Path(config.data), config.size or FILE_SIZE
    if config.data and path.is_dir():  # an empty one would be the folder that one is in
        found = read_voc(path, config.classes or None)
    elif config.classes:
        raise ValueError(f"data: classes must be absent but with a folder of VOC's XML, got {config.data}")
    elif path.is_file():
        found = read_coco(path, config.images or path.parent)
    else:
        raise ValueError(
            f"scenes: {config.data!r} must be a folder of VOC's XML, COCO's JSON, or one of "
            f"{', '.join(NAMED)}, got no such path"
        )
    images, masks = agreeing(found, masks=target == "mask"), target == "mask"
    if found.skipped:
        named = [f"{name} ({why})" for name, why in list(found.skipped.items())[:3]]
        more = f" and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
        report(f"skipped    {len(found.skipped):,} that cannot be used: {', '.join(named)}{more}")
    # One of every 1 / share images; the small term keeps 10 * 0.1 and the like from falling below a whole.
    ends = np.floor(np.arange(len(images) + 1) * config.validation + 1e-9)
    taken = ends[1:] > ends[:-1]
    parts = [[image for image, held in zip(images, taken, strict=True) if held == part] for part in (0, 1)]
    if not all(parts):
        raise ValueError(
            f"scenes: validation must leave images to train on and to validate on, got {config.validation} "
            f"of {len(images)}"
        )
    options = {"masks": masks, "report": report}
    training = DrawnScenes(parts[0], size, len(found.classes), seed=seed, flip=config.flip, **options)
    held_out = DrawnScenes(parts[1], size, len(found.classes), **options)
    counts = f"{len(training):,} to train on, {len(held_out):,} to validate on"
    classes = counted(len(found.classes), "class")
    objects = f"{sum(len(image.boxes) for image in images):,} objects of {classes}"
    report(f"scenes     {path.name}: {counts}, {objects}, {size} x {size}")
    return training, held_out, len(held_out), found.classes, size
