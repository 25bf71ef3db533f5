"""Segmentation: from features of every pixel to its class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lspm_kernels import cross_entropy
from lspm_models.models.unet import UNet, UNetConfig
from lspm_models.models.vision_layers import Conv2d

IGNORE_INDEX = -100


class Segmentation(nn.Module):
    """A U-Net with a linear head for every pixel.

    Args:
        model: gives the features.
        classes: how many, the background included.
    """

    unit = "image"
    metric_names = ("mean_iou", "pixel_accuracy")

    def __init__(self, model: UNet, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        self.head = Conv2d(model.config.width, classes, 1)

    @property
    def config(self) -> UNetConfig:
        """The model's."""
        return self.model.config

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of images (N, channels, H, W)."""
        return self.head(self.model(images))

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats over the pixels, in float32.

        Args:
            images: (N, channels, H, W).
            targets: (N, H, W) int64 classes, -100 where a pixel does not count.

        Raises:
            ValueError: targets have another shape.
        """
        return self._loss(self(images), targets)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        expected = (len(logits), *logits.shape[2:])
        if targets.shape != expected:
            raise ValueError(
                f"Segmentation.loss: targets must have the shape {expected}, got {tuple(targets.shape)}"
            )
        rows = logits.float().permute(0, 2, 3, 1).reshape(-1, self.classes)
        return cross_entropy(rows, targets.flatten(), ignore_index=IGNORE_INDEX)

    def evaluate(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the counts of true and predicted classes that metrics() wants summed."""
        logits = self(images)
        counted = targets != IGNORE_INDEX
        pairs = targets[counted] * self.classes + logits.argmax(1)[counted]
        return self._loss(logits, targets), torch.bincount(pairs, minlength=self.classes**2)

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the mean over the classes of intersection over union, and the share of right pixels.

        A class that is neither there nor predicted does not count.
        """
        counts = torch.tensor(sums, dtype=torch.float64).view(self.classes, self.classes)
        return {
            "mean_iou": self.ious(sums).nanmean().item(),
            "pixel_accuracy": (counts.trace() / counts.sum()).item(),
        }

    def ious(self, sums: list[float]) -> Tensor:
        """Returns intersection over union of each class, NaN where it is neither there nor predicted."""
        counts = torch.tensor(sums, dtype=torch.float64).view(self.classes, self.classes)
        right = counts.diagonal()
        return right / (counts.sum(0) + counts.sum(1) - right)
