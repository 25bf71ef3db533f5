"""A ResNet on our kernels and torchvision's of the same weights, in evaluation and in training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from lspm_models.models.resnet import NAMED, ResNet
from lspm_models.models.vision_layers import pack_for_inference

LAST = torch.channels_last


@dataclass(frozen=True)
class Run:
    """Features of a batch of images; in training also their mean square's gradients, without an optimizer."""

    mode: str
    name: str
    dtype: torch.dtype
    batch: int
    size: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}/{self.mode}/{dtype}/B{self.batch}-{self.size}x{self.size}"

    def model(self, variant: str, exact: bool = False) -> nn.Module:
        torch.manual_seed(0)
        ours = ResNet(NAMED[self.name])
        model = ours
        if variant != "lspm":
            model = torchvision.models.get_model(self.name)
            model.load_state_dict(ours.state_dict(), strict=False)
            model.fc = nn.Identity()
        model = model.to(self.dtype).to(torch.float64 if exact else self.dtype).to(memory_format=LAST)
        model = model.train(self.mode != "inference")
        if variant == "lspm" and self.mode == "inference":
            pack_for_inference(model)
        return torch.compile(model, dynamic=False) if variant == "compile" else model

    def step(self, variant: str, exact: bool = False) -> Callable[[], list[Tensor]]:
        model = self.model(variant, exact)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        images = images.to(self.dtype).contiguous(memory_format=LAST)
        images = images.double() if exact else images
        trains = self.mode != "inference"
        parameters = [p for _, p in sorted(model.named_parameters())]

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(trains):
                features = model(images)
            if not trains:
                return [features]
            return [features.detach(), *torch.autograd.grad(features.square().mean(), parameters)]

        return run
