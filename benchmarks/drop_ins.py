"""Models that people have, of random weights, as they are and after lspm_kernels.accelerate."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import machine
import torch
import zoo
from torch import Tensor, nn

import lspm_kernels

VARIANTS = "lspm", "torch", "compile"
ZOO = "zoo/"  # before the names of zoo's models: of one row in evaluation, of four in training
LENGTHS = (128, 96, 77, 64, 50, 33, 20, 12)  # of a padded batch of sentences
LABELS = 2


def gpt2(smoke: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2} if smoke else {}
    tokens = torch.randint(50257, (2, 32 if smoke else 512))
    return GPT2LMHeadModel(GPT2Config(**sizes)), {"input_ids": tokens, "labels": tokens}


def bert(smoke: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(num_labels=LABELS, **(sizes if smoke else {}))
    tokens = torch.randint(1000, config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.randint(LABELS, (len(LENGTHS),))
    return BertForSequenceClassification(config), {
        "input_ids": tokens * mask,
        "attention_mask": mask,
        "labels": labels,
    }


def vit(smoke: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(num_labels=1000, **(sizes if smoke else {})))
    return model, {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(1000, (8,))}


def resnet50(smoke: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    import torchvision

    model = torchvision.models.resnet50()
    size = 64 if smoke else 224
    return model, {"x": torch.randn(8, 3, size, size)}


@dataclass(frozen=True)
class DropIn:
    """Logits of a model in evaluation; in training its loss, or of features a weighted mean, and the
    gradients, without an optimizer and without dropout, which draws other numbers on each side.
    bfloat16 is the model's own dtype in evaluation, and autocast over float32 weights in training."""

    name: str
    mode: str
    dtype: torch.dtype
    smoke: bool = False

    def __str__(self) -> str:
        return f"{self.name}/{self.mode}/{str(self.dtype).removeprefix('torch.')}"

    def step(self, variant: str) -> Callable[[], list[Tensor]]:
        """variant: lspm, torch or compile; "exact" is torch in float64. The step gives its loss, or where
        it is asked the logits, of which one rounding more or less says nothing."""
        torch.manual_seed(0)
        trains = self.mode != "inference"
        if self.name.startswith(ZOO):
            name, batch = self.name.removeprefix(ZOO), 4 if trains else 1
            model, given = zoo.built(name, tiny=self.smoke, batch=batch, trains=trains)
        else:
            model, given = globals()[self.name](self.smoke)
            zoo.drop_nothing(model)
        own = torch.float64 if variant == "exact" else torch.float32 if trains else self.dtype
        if own == torch.float64 and not trains:
            model = model.to(self.dtype)  # what is rounded in the weights is nobody's error
        model = model.train(trains).to(own)
        given = {k: v.to(self.dtype).to(own) if v.is_floating_point() else v for k, v in given.items()}
        if variant == "lspm":
            lspm_kernels.accelerate(model, inference=not trains)
        call = torch.compile(model, dynamic=False) if variant == "compile" else model
        autocast = trains and self.dtype != torch.float32 and own != torch.float64
        parameters = [p for p in model.parameters() if p.requires_grad]

        def run(logits: bool = False) -> list[Tensor]:
            with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, autocast):
                out = call(**given)
            if not trains:
                return [zoo.logits_of(out)]
            loss = zoo.loss_of(out)
            made = zoo.logits_of(out).detach() + 0 if logits else loss.detach()
            return [made, *torch.autograd.grad(loss, parameters)]

        return run

    def peak_bytes(self, variant: str) -> int | None:
        """The most memory of a second step at once."""
        return machine.second_peak(functools.partial(self.step, variant))
