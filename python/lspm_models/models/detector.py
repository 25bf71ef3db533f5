"""A detector without anchors: each pixel of a pyramid of features says what it is in, and where that ends.

Sources: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, 2019; Lin et al., Feature Pyramid
Networks for Object Detection, 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.models.resnet import ResNet, ResNetConfig
from lspm_models.models.vision_layers import Conv2d, ConvBatchNorm

PRIOR = (
    0.01  # probability of an object at a pixel before training, so that the many empty ones do not drown it
)


@dataclass(frozen=True)
class DetectorConfig:
    """The shape of a detector.

    Args:
        classes: how many kinds of objects.
        backbone: gives the features.
        width: features of every level of the pyramid.
        levels: how many of the backbone's coarsest strides are used.
        convolutions: of each of the two heads.

    Raises:
        ValueError: a value breaks its rule.
    """

    classes: int
    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    width: int = 64
    levels: int = 3
    convolutions: int = 2

    def __post_init__(self) -> None:
        for name in ("classes", "width", "levels", "convolutions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"DetectorConfig: {name} must be a positive integer, got {value!r}")
        if self.levels > 4:
            raise ValueError(f"DetectorConfig: levels must be at most 4, got {self.levels}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of each level, the finest first."""
        return self.backbone.strides[-self.levels :]


class Answers(NamedTuple):
    """What a detector says at each of the P pixels of all levels.

    Args:
        logits: (N, P, classes).
        distances: (N, P, 4) pixels from a point to the left, upper, right and lower side.
        centerness: (N, P) logits of how much in the middle of the object the point is.
        points: (P, 2) x and y in the image.
        strides: (P,) of the level.
    """

    logits: Tensor
    distances: Tensor
    centerness: Tensor
    points: Tensor
    strides: Tensor


class Detector(nn.Module):
    """Classes and boxes at every pixel of a pyramid."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        width = config.width
        features = config.backbone.features[-config.levels :]
        self.lateral = nn.ModuleList(Conv2d(inputs, width, 1) for inputs in features)
        self.smooth = nn.ModuleList(ConvBatchNorm(width, width) for _ in features)
        self.class_head, self.box_head = (
            nn.Sequential(*(ConvBatchNorm(width, width) for _ in range(config.convolutions)))
            for _ in range(2)
        )
        self.classes = Conv2d(width, config.classes, 3, padding=1)
        self.boxes = Conv2d(width, 4, 3, padding=1)
        self.centerness = Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(
            torch.ones(config.levels)
        )  # levels share a head, their boxes differ in size
        for layer in (self.classes, self.boxes, self.centerness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classes.bias, -math.log((1 - PRIOR) / PRIOR))

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Features (N, width, H / stride, W / stride) of each level, the finest first."""
        found = self.backbone.pyramid(images)[-self.config.levels :]
        coarser, levels = None, []
        for lateral, smooth, features in zip(*map(reversed, (self.lateral, self.smooth, found)), strict=True):
            level = lateral(features)
            if coarser is not None:
                level = level + F.interpolate(coarser, size=level.shape[-2:])
            coarser = level
            levels.append(smooth(level))
        return levels[::-1]

    def forward(self, images: Tensor) -> Answers:
        """What is where on images (N, channels, H, W)."""
        parts = []
        for level, (features, stride) in enumerate(
            zip(self.pyramid(images), self.config.strides, strict=True)
        ):
            of_class, of_box = self.class_head(features), self.box_head(features)
            # Softplus rather than FCOS's exp: its gradient does not grow with the box.
            distances = F.softplus(self.boxes(of_box).float() * self.scales[level]) * (4 * stride)
            points = _points(features.shape[-2:], stride, features.device)
            strides = torch.full((len(points),), float(stride), device=features.device)
            parts.append(
                (
                    _rows(self.classes(of_class).float()),
                    _rows(distances),
                    _rows(self.centerness(of_box).float())[..., 0],
                    points,
                    strides,
                )
            )
        logits, distances, centerness, points, strides = zip(*parts, strict=True)
        batched = (torch.cat(part, 1) for part in (logits, distances, centerness))
        return Answers(*batched, torch.cat(points), torch.cat(strides))


def _rows(x: Tensor) -> Tensor:
    """Returns (N, H * W, C) of (N, C, H, W)."""
    return x.flatten(2).transpose(1, 2)


def _points(shape: torch.Size, stride: int, device: torch.device) -> Tensor:
    y, x = ((torch.arange(size, device=device) + 0.5) * stride for size in shape)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)


def boxes_at(points: Tensor, distances: Tensor) -> Tensor:
    """Returns boxes (..., 4) of x0, y0, x1, y1 from points (..., 2) and distances (..., 4) to their sides."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each of boxes a (N, 4) with each of b (M, 4): (N, M)."""
    corners = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (corners[1] - corners[0]).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1] - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def non_maximum_suppression(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Finds the boxes that no better one of the same class covers.

    Args:
        boxes: (N, 4).
        scores: (N,).
        labels: (N,) int64.
        threshold: a box whose IoU with a better one that stays is above this goes.

    Returns:
        The places of those that stay, the best first.
    """
    order = scores.argsort(descending=True, stable=True)
    # In float64, as torchvision compares: in float32 the threshold would be rounded, too.
    covered = iou(boxes[order], boxes[order]).double() > threshold
    covered = (covered & (labels[order][:, None] == labels[order])).triu(1)
    stays = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for place in range(len(order)):
        if stays[place]:
            stays &= ~covered[place]
    return order[stays]
