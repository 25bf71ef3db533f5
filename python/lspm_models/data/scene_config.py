"""What a run is told of its scenes: images in which something has to be found."""

from __future__ import annotations

from dataclasses import dataclass

from lspm_models.data.image_config import MOST_SIZE
from lspm_models.data.image_files import NAMED
from lspm_models.options import option

MOST_OBJECTS = 1000  # a scene tries places for each, and has room for few
PASTED_SIZE, FILE_SIZE = 96, 256  # pixels on a side where no size is asked for


@dataclass(frozen=True)
class SceneConfig:
    """Which scenes, and how they are varied in training."""

    data: str = option(
        "mnist_5k",
        f"{', '.join(NAMED)}: pasted on textures, a new scene each time; a folder with Pascal VOC's XML; "
        "or COCO's JSON",
        metavar="DATA",
    )
    images: str | None = option(None, "where COCO's images lie", default="beside the JSON", metavar="FOLDER")
    classes: tuple[str, ...] = option((), "of VOC, in the order of its masks", default="all found, sorted")
    size: int | None = option(
        None, "pixels of the longer side", default=f"{PASTED_SIZE} pasted, {FILE_SIZE} of files"
    )
    most: int = option(4, "objects pasted into a scene at most")
    validation: float = option(0.2, "share of the images set aside")
    flip: bool = option(False, "mirror half of the files")

    def __post_init__(self) -> None:
        for name, least, greatest in (("size", 32, MOST_SIZE), ("most", 1, MOST_OBJECTS)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data: {name} must be at least {least}, got {value}")
            if value is not None and value > greatest:
                raise ValueError(f"data: {name} must be at most {greatest}, got {value}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"data: classes must be different ones, got {' '.join(self.classes)}")
        if not 0 < self.validation < 1:
            raise ValueError(f"data: validation must be between 0 and 1, got {self.validation}")
