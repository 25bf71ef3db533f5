"""ResNet, Wide ResNet and ResNeXt; each convolution, its batch norm, ReLU and residual are one call.

Sources: He et al., Deep Residual Learning for Image Recognition, 2015 (with the stride in the 3x3 convolution
of a bottleneck, as torchvision has it); Zagoruyko and Komodakis, Wide Residual Networks, 2016; Xie et al.,
Aggregated Residual Transformations for Deep Neural Networks, 2016. Names in the state dict are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lspm_kernels import global_avg_pool, max_pool2d
from lspm_models.models.vision_layers import conv_batch_norm

BLOCKS = ("basic", "bottleneck")


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a ResNet.

    Args:
        block: "basic", two 3x3 convolutions, or "bottleneck", 1x1, 3x3, 1x1 with four times the outputs.
        layers: blocks of each of the four stages.
        channels: of the images.
        width: features of the first stage, before a bottleneck's fourfold; each stage doubles them.
        groups: of the 3x3 convolution of a bottleneck.
        group_width: features of a group, for a width of 64.
        stem: pixels on a side of the first convolution's window.
        stem_stride: of the first convolution.
        stem_pool: whether a 3x3 max pool of stride 2 follows it. Photos want 7, 2, true; small images 3, 1,
            false.
        zero_init_residual: whether every block begins as the identity.

    Raises:
        ValueError: a value breaks its rule.
    """

    block: str = "basic"
    layers: tuple[int, ...] = (2, 2, 2, 2)
    channels: int = 3
    width: int = 64
    groups: int = 1
    group_width: int = 64
    stem: int = 7
    stem_stride: int = 2
    stem_pool: bool = True
    zero_init_residual: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.block not in BLOCKS:
            raise ValueError(f"ResNetConfig: block must be one of {', '.join(BLOCKS)}, got {self.block!r}")
        if len(self.layers) != 4 or any(type(count) is not int or count < 1 for count in self.layers):
            raise ValueError(f"ResNetConfig: layers must be four positive integers, got {self.layers}")
        for name in ("channels", "width", "groups", "group_width", "stem", "stem_stride"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"ResNetConfig: {name} must be a positive integer, got {value!r}")
        if self.stem % 2 == 0:
            raise ValueError(f"ResNetConfig: stem must be odd, got {self.stem}")
        if self.block == "basic" and (self.groups, self.group_width) != (1, 64):
            got = f"{self.groups} of {self.group_width}"
            raise ValueError(f"ResNetConfig: groups must be 1 of 64 where block is 'basic', got {got}")
        if self.block == "bottleneck" and self.width * self.group_width % 64:
            raise ValueError(
                f"ResNetConfig: width times group_width must be a multiple of 64, "
                f"got {self.width} times {self.group_width}"
            )
        for name in ("stem_pool", "zero_init_residual"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"ResNetConfig: {name} must be true or false, got {getattr(self, name)!r}")

    @property
    def expansion(self) -> int:
        """How many times its width a stage gives."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def features(self) -> tuple[int, ...]:
        """Features after the stem and after each stage."""
        return (self.width, *(self.width * 2**stage * self.expansion for stage in range(4)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel after the stem and after each stage."""
        first = self.stem_stride * (2 if self.stem_pool else 1)
        return (self.stem_stride, first, 2 * first, 4 * first, 8 * first)


BASIC, DEEP = ResNetConfig(), ResNetConfig(block="bottleneck", layers=(3, 4, 6, 3))
NAMED = {
    "resnet10": replace(BASIC, layers=(1, 1, 1, 1)),
    "resnet18": BASIC,
    "resnet34": replace(BASIC, layers=(3, 4, 6, 3)),
    "resnet50": DEEP,
    "resnet101": replace(DEEP, layers=(3, 4, 23, 3)),
    "resnet152": replace(DEEP, layers=(3, 8, 36, 3)),
    "resnext50_32x4d": replace(DEEP, groups=32, group_width=4),
    "resnext101_32x8d": replace(DEEP, layers=(3, 4, 23, 3), groups=32, group_width=8),
    "resnext101_64x4d": replace(DEEP, layers=(3, 4, 23, 3), groups=64, group_width=4),
    "wide_resnet50_2": replace(DEEP, group_width=128),
    "wide_resnet101_2": replace(DEEP, layers=(3, 4, 23, 3), group_width=128),
}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Basic(nn.Module):
    """Two 3x3 convolutions beside a residual."""

    def __init__(self, config: ResNetConfig, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _downsample(inputs, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the residual is added."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = conv_batch_norm(x, self.conv1, self.bn1, "relu")
        return conv_batch_norm(y, self.conv2, self.bn2, "relu", _residual(self.downsample, x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a residual."""

    def __init__(self, config: ResNetConfig, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        inner, outputs = width * config.group_width // 64 * config.groups, 4 * width
        self.conv1, self.bn1 = _conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, config.groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the residual is added."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = conv_batch_norm(x, self.conv1, self.bn1, "relu")
        y = conv_batch_norm(y, self.conv2, self.bn2, "relu")
        return conv_batch_norm(y, self.conv3, self.bn3, "relu", _residual(self.downsample, x))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _residual(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    return x if downsample is None else conv_batch_norm(x, *downsample)


class ResNet(nn.Module):
    """Features of images; a task's head makes something of them."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = _conv(config.channels, config.width, config.stem, config.stem_stride)
        self.bn1 = nn.BatchNorm2d(config.width)
        block: Callable[..., nn.Module] = Basic if config.block == "basic" else Bottleneck
        inputs = config.width
        for stage, count in enumerate(config.layers):
            width, blocks = config.width * 2**stage, []
            for index in range(count):
                blocks.append(block(config, inputs, width, 2 if stage and not index else 1))
                inputs = width * config.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights that keep the size of gradients (He et al., 2015); norms are the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        if self.config.zero_init_residual:
            for block in self.modules():
                if isinstance(block, (Basic, Bottleneck)):
                    nn.init.zeros_(block.last_norm.weight)

    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem and of the four stages, as fine-tuning freezes them."""
        return [[self.conv1, self.bn1], *([getattr(self, f"layer{stage}")] for stage in range(1, 5))]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Features after the stem, before its pool, and after each stage.

        Args:
            images: (N, channels, H, W), normalised.

        Returns:
            Five tensors (N, features, H / stride, W / stride), rounded up, of config.features and
            config.strides.

        Raises:
            ValueError: images are not such.
        """
        if images.ndim != 4 or images.shape[1] != self.config.channels or not images.is_floating_point():
            got = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"ResNet: images must be (N, {self.config.channels}, H, W) floating point, got {got}"
            )
        x = images.contiguous(memory_format=torch.channels_last)
        found = [conv_batch_norm(x, self.conv1, self.bn1, "relu")]
        x = max_pool2d(found[0], 3, 2, 1) if self.config.stem_pool else found[0]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the last stage's features, (N, C), of images (N, channels, H, W)."""
        return global_avg_pool(self.pyramid(images)[-1]).flatten(1)
