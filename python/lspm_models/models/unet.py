"""U-Net on a ResNet: features of every pixel, from coarse ones that see far and fine ones that see sharply.

Source: Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, 2015, with a
ResNet for the half that goes down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.models.resnet import ResNet, ResNetConfig
from lspm_models.models.vision_layers import ConvBatchNorm


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net.

    Args:
        backbone: the half that goes down.
        width: features of every pixel; a level of stride s has up to s times as many, at most eight times.

    Raises:
        ValueError: a value breaks its rule.
    """

    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    width: int = 32

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise ValueError(f"UNetConfig: width must be a positive integer, got {self.width!r}")

    @property
    def levels(self) -> tuple[int, ...]:
        """Which of the backbone's features are used: the last of each stride, the finest first."""
        strides = self.backbone.strides
        return tuple(i for i, stride in enumerate(strides) if stride not in strides[i + 1 :])


class Up(nn.Module):
    """Features of the level below, twice as fine, beside those of this level; two convolutions merge them."""

    def __init__(self, below: int, beside: int, outputs: int) -> None:
        super().__init__()
        self.merge = ConvBatchNorm(below + beside, outputs)
        self.refine = ConvBatchNorm(outputs, outputs)

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:
        # The nearest, and to the size of this level: an odd one has been rounded up on the way down.
        below = F.interpolate(below, size=beside.shape[-2:])
        return self.refine(self.merge(torch.cat((below, beside), 1)))


class UNet(nn.Module):
    """Features of every pixel."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        features, strides = config.backbone.features, config.backbone.strides
        *finer, coarsest = config.levels
        self.up, below = nn.ModuleList(), features[coarsest]
        for level in reversed(finer):
            outputs = config.width * min(strides[level], 8)
            self.up.append(Up(below, features[level], outputs))
            below = outputs
        self.last = ConvBatchNorm(below, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, width, H, W) of images (N, channels, H, W)."""
        pyramid = self.backbone.pyramid(images)
        *finer, coarsest = self.config.levels
        x = pyramid[coarsest]
        for up, level in zip(self.up, reversed(finer), strict=True):
            x = up(x, pyramid[level])
        if x.shape[-2:] != images.shape[-2:]:
            x = F.interpolate(x, size=images.shape[-2:])
        return self.last(x)
