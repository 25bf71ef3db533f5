"""What a run is told of its images, and what its model is made for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lspm_models.data.image_files import NAMED
from lspm_models.files import write_atomically
from lspm_models.options import option

MOST_SIZE = 4096  # pixels on a side; a batch of such images takes gigabytes
FOLDER_SIZE = 224  # pixels on a side of images from files of their own, as ImageNet's networks see them


@dataclass(frozen=True)
class ImageConfig:
    """Which images, and how they are varied in training."""

    data: str = option(
        "fashion-mnist",
        f"{', '.join(NAMED)}; an IDX, CSV or CIFAR file, or a folder with such or with a folder per class",
        metavar="DATA",
    )
    size: int | None = option(None, "pixels on a side", default=f"as they are; {FOLDER_SIZE} of image files")
    channels: int | None = option(None, "1 for grey, 3 for colours", default="as they are; 3 of image files")
    validation: float = option(0.1, "share of each class set aside, where the data has no test part")
    crop: int = option(0, "pixels by which an image may be shifted, with black behind it")
    flip: bool = option(False, "mirror half of the images")
    jitter: float = option(0.0, "how far brightness, contrast and saturation vary, 0.4 is strong")
    mixup: float = option(0.0, "alpha of mixing pairs of images, 0 for none")
    cutmix: float = option(0.0, "alpha of pasting a part of one image into another, 0 for none")
    label_smoothing: float = option(0.0, "probability given to all classes alike")

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            value = getattr(self, name)
            if value is not None and value < (name == "size"):
                raise ValueError(f"data: {name} must be at least {int(name == 'size')}, got {value}")
        if self.size is not None and self.size > MOST_SIZE:
            raise ValueError(f"data: size must be at most {MOST_SIZE}, got {self.size}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"data: channels must be 1 or 3, got {self.channels}")
        for name in ("validation", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"data: {name} must be at least 0 and less than 1, got {getattr(self, name)}"
                )
        for name in ("jitter", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"data: {name} must be 0 or greater, got {getattr(self, name)}")


@dataclass(frozen=True)
class ImageFormat:
    """What a model was made for: its classes, and what its pixels look like."""

    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Returns pixels (N, C, H, W), 0 to 255, as float32 of mean 0 and deviation 1 in each channel."""
        mean, deviation = self._numbers()
        return (pixels / 255 - mean) / deviation

    def shown(self, images: Tensor) -> Tensor:
        """Returns normalised images (N, C, H, W) as pixels, 0 to 1."""
        mean, deviation = self._numbers()
        return (images * deviation + mean).clamp(0, 1)

    def _numbers(self) -> Iterator[Tensor]:
        return (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.deviation))

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        write_atomically(path, text.encode() + b"\n")


def load_format(path: Path) -> ImageFormat:
    """Reads what ImageFormat.save() wrote.

    Raises:
        ValueError: there is no such file, or it is another.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return ImageFormat(**{name: _tuples(value) for name, value in content.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"images: {path} must be the format of a run's images, got {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
