"""A GPT trained on our kernels, on plain PyTorch, and in float64: the loss of each step, and a picture."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from results import Rows
from torch import Tensor

from lspm_kernels import AdamW
from lspm_models.data.text import TextConfig, TextData, prepare_text
from lspm_models.models.gpt import GPT, GPTConfig
from lspm_models.models.operations import FUSED, PLAIN
from lspm_models.tasks.language_modelling import LanguageModelling

# "an ulp away" is plain PyTorch again, from weights of which each is the next number of its dtype.
SIDES = ("lspm", "torch", "an ulp away", "float64")
CLIP = 1.0


@dataclass(frozen=True)
class Convergence:
    """Steps on random blocks of a text; bfloat16 is autocast over float32 weights.

    Each side has the same weights and sees the same blocks: they differ in kernels, optimizer and dtype.
    """

    name: str
    shape: GPTConfig
    data: TextConfig
    dtype: torch.dtype
    steps: int
    batch: int = 16
    learning_rate: float = 2e-3

    def __str__(self) -> str:
        return f"convergence/{str(self.dtype).removeprefix('torch.')}/{self.name}-{self.steps}-steps"

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        with tempfile.TemporaryDirectory() as folder:
            _, tokens = prepare_text(self.data, Path(folder))
            blocks = TextData(tokens, self.shape.context, self.batch).training
            for _ in range(self.steps):
                yield blocks.next_batch()

    def losses(self, side: str, device: str = "cpu") -> Tensor:
        """(steps,) in float64 there, else in float32."""
        torch.manual_seed(0)
        task = LanguageModelling(GPT(self.shape, ops=FUSED if side == "lspm" else PLAIN))
        if side == "float64":
            task.double()
        if side == "an ulp away":
            with torch.no_grad():
                for parameter in task.parameters():
                    parameter.copy_(torch.nextafter(parameter, torch.tensor(torch.inf)))
        parameters = list(task.to(device).parameters())
        if side == "lspm":
            optimizer = AdamW(parameters, lr=self.learning_rate, clip_norm=CLIP)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, fused=True)
        mixed, losses = self.dtype == torch.bfloat16 and side != "float64", []
        for tokens, targets in self.batches():
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                loss = task.loss(tokens.to(device), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            if side != "lspm":
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            losses.append(loss.detach().cpu())
        return torch.stack(losses)


def plot(rows: Rows, path: Path, about: str) -> None:
    """Draws the losses of each dtype, and below them how far each side is from float64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(rows), figsize=(9, 5), layout="constrained", squeeze=False)
    for (above, below), row in zip(axes.T, rows, strict=True):
        curves = {side: torch.tensor(curve, dtype=torch.float64) for side, curve in row["losses"].items()}
        for side, style in zip(SIDES, ("-", "--", ":", "-."), strict=True):
            above.plot(curves[side], style, label=side, linewidth=1)
            if side != "float64":
                below.plot((curves[side] - curves["float64"]).abs(), style, label=side, linewidth=1)
        below.set_yscale("log")
        above.set_title(row["case"], fontsize=8)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("distance from float64's")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(about, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
