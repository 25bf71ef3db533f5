"""A ResNet on our kernels and torchvision's of the same weights, in evaluation and in training."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import machine
import torch
import torchvision
from torch import Tensor, nn

from lspm_models.models.resnet import NAMED, ResNet
from lspm_models.models.vision_layers import pack_for_inference

LAST = torch.channels_last
SMALL = 64  # images below this many pixels on a side have a stem for them: 3x3, stride 1, no pool


@dataclass(frozen=True)
class Run:
    """Features of a batch of images; in training also their mean square's gradients, without an optimizer."""

    mode: str
    name: str
    dtype: torch.dtype
    batch: int
    size: int
    compiled: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}/{self.mode}/{dtype}/B{self.batch}-{self.size}x{self.size}"

    def model(self, variant: str, exact: bool = False) -> nn.Module:
        torch.manual_seed(0)
        stem = {"stem": 3, "stem_stride": 1, "stem_pool": False} if self.size < SMALL else {}
        ours = ResNet(replace(NAMED[self.name], **stem))
        model = ours
        if variant != "lspm":
            model = torchvision.models.get_model(self.name)
            if stem:
                model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            model.load_state_dict(ours.state_dict(), strict=False)
            model.fc = nn.Identity()
        model = model.to(self.dtype).to(torch.float64 if exact else self.dtype).to(memory_format=LAST)
        model = model.train(self.mode != "inference")
        if variant == "lspm" and self.mode == "inference":
            pack_for_inference(model)
        return torch.compile(model, dynamic=False) if variant == "compile" else model

    @property
    def variants(self) -> tuple[str, ...]:
        """Who is timed: OpenVINO too, which only infers, where it is installed."""
        peer = self.mode == "inference" and importlib.util.find_spec("openvino")
        return ("lspm", "torch", *["compile"] * self.compiled, *["openvino"] * bool(peer))

    def openvino(self) -> Callable[[], list[Tensor]]:
        """Torchvision's model of float32 weights in OpenVINO, which takes the dtype as a hint."""
        import openvino

        images = torch.randn(self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))
        model = replace(self, dtype=torch.float32).model("torch").eval()
        converted = openvino.convert_model(model, example_input=images, input=list(images.shape))
        hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        hints["INFERENCE_PRECISION_HINT"] = "bf16" if self.dtype == torch.bfloat16 else "f32"
        request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
        given = images.to(self.dtype).float().numpy()
        return lambda: [torch.from_numpy(request.infer([given])[0])]

    def peak_bytes(self, variant: str, device: str) -> int | None:
        """The most memory of a second step at once."""
        return machine.second_peak(functools.partial(self.step, variant, device=device), device)

    def step(self, variant: str, exact: bool = False, device: str = "cpu") -> Callable[[], list[Tensor]]:
        if variant == "openvino":
            return self.openvino()
        model = self.model(variant, exact).to(device)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        images = images.to(device, self.dtype).contiguous(memory_format=LAST)
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
