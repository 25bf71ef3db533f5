"""Varied images for training, by torchvision's transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from lspm_models.data.image_config import ImageConfig


class Augmentation:
    """What the options ask for; nothing of torchvision is needed where they ask for nothing.

    Args:
        config: crop, flip, jitter, mixup and cutmix.
        size: pixels on a side.
        classes: how many.

    Raises:
        ValueError: torchvision is not installed, or was built for another PyTorch; crop could leave nothing
            of an image.
    """

    def __init__(self, config: ImageConfig, size: int, classes: int) -> None:
        self._each, self._mixed = [], []
        wanted = [name for name in ("crop", "flip", "jitter", "mixup", "cutmix") if getattr(config, name)]
        if not wanted:
            return
        if config.crop >= size:
            raise ValueError(f"data: crop must be less than the {size} pixels of a side, got {config.crop}")
        try:
            from torchvision.transforms import v2
        except (ImportError, RuntimeError) as error:  # RuntimeError: its operators are of another PyTorch
            raise ValueError(
                f"images: {wanted[0]} needs torchvision, of the release that fits torch {torch.__version__}; "
                f"install it with: pip install torchvision ({error})"
            ) from error
        if config.crop:
            self._each.append(v2.RandomCrop(size, padding=config.crop))
        if config.flip:
            self._each.append(v2.RandomHorizontalFlip())
        if config.jitter:
            self._each.append(v2.ColorJitter(config.jitter, config.jitter, config.jitter))
        if config.mixup:
            self._mixed.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            self._mixed.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))

    def each(self, pixels: Tensor) -> Tensor:
        """Returns pixels (N, C, H, W) uint8, every image varied on its own."""
        if not self._each:
            return pixels
        varied = list(pixels)  # torchvision would vary a batch as one
        for transform in self._each:
            varied = [transform(image) for image in varied]
        return torch.stack(varied)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images mixed in pairs, by one way of those asked for, and probabilities of classes."""
        if not self._mixed:
            return images, labels
        chosen = self._mixed[int(torch.randint(len(self._mixed), ()))]
        return chosen(images, labels)
