"""Classification: from an image's features to its class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lspm_kernels import cross_entropy
from lspm_models.models.freezing import freeze_stages
from lspm_models.models.resnet import ResNet, ResNetConfig


class Classification(nn.Module):
    """A ResNet with a linear head.

    torchvision's ResNets have the same names without `model.` before those of the features; see
    to_torchvision() and from_torchvision().

    Args:
        model: gives the features.
        classes: how many.
        label_smoothing: probability that the targets give to all classes alike, in training.
        frozen: how many of the stem and the four stages keep their weights and running statistics.
    """

    unit = "image"
    metric_names = ("accuracy",)

    def __init__(self, model: ResNet, classes: int, *, label_smoothing: float = 0.0, frozen: int = 0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.fc = nn.Linear(model.config.features[-1], classes)
        self._frozen = freeze_stages(model, frozen)

    @property
    def config(self) -> ResNetConfig:
        """The model's."""
        return self.model.config

    def train(self, mode: bool = True) -> Classification:
        """Switches between training and evaluation; frozen stages stay in evaluation."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W)."""
        return self.fc(self.model(images))

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, in float32, to targets (N,) int64 or (N, classes) probabilities."""
        return cross_entropy(self(images).float(), targets, label_smoothing=self.label_smoothing)

    def evaluate(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy without smoothing, and what metrics() wants summed over all batches."""
        logits = self(images).float()
        correct = (logits.argmax(1) == targets).sum()
        return cross_entropy(logits, targets), torch.stack([correct, torch.full_like(correct, len(targets))])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the share of images whose most probable class is right."""
        correct, count = sums
        return {"accuracy": correct / count}


def to_torchvision(task: Classification) -> dict[str, Tensor]:
    """Returns the weights as torchvision's ResNet of the same shape names them."""
    return {name.removeprefix("model."): tensor for name, tensor in task.state_dict().items()}


def from_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of torchvision's ResNet as Classification names them."""
    return {name if name.startswith("fc.") else f"model.{name}": tensor for name, tensor in weights.items()}
