"""One training step of a GPT on our kernels, on plain PyTorch, and of transformers' GPT-2."""

import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels import AdamW
from lspm_models.language_models import make_task
from lspm_models.models.gpt import GPTConfig
from lspm_models.models.llama import LlamaConfig
from lspm_models.models.operations import FUSED, PLAIN
from lspm_models.tasks.language_modelling import LanguageModelling

VARIANTS = {"lspm": FUSED, "torch": PLAIN}
THEIRS = "hugging face", "hugging face compiled"
GOALS = {torch.float32: 1.8, torch.bfloat16: 3.0}  # x the better of transformers'
MOST_MEMORY = 60  # % of transformers'
CLIP = 1.0  # the largest norm of the gradients, as in GPT-3's training
# What plain PyTorch says of its own RMS norm under autocast.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
TINY = GPTConfig(vocabulary_size=128, context=32, layers=2, heads=2, width=64)


class HuggingFace(nn.Module):
    """transformers' GPT-2 of the same shape, by its own loss."""

    def __init__(self, config: GPTConfig, compiled: bool):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = {"n_layer": config.layers, "n_head": config.heads, "n_embd": config.width}
        sizes |= {"vocab_size": config.vocabulary_size, "n_positions": config.context}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts))
        self.call = torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Of each token but the first: their loss shifts by itself."""
        return self.call(input_ids=tokens, labels=tokens, use_cache=False).loss


@dataclass(frozen=True)
class Training:
    """Forward, loss, backward, clipping and AdamW on batch x tokens ids; bfloat16 is autocast over float32
    weights."""

    name: str
    config: GPTConfig | LlamaConfig
    dtype: torch.dtype
    batch: int
    tokens: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"gpt/training-step/{dtype}/{self.name}-B{self.batch}-T{self.tokens}"

    def step(self, variant: str, device: str) -> Callable[[], None]:
        """A function that trains a new model by one step."""
        model, tokens, targets = self._model(variant, device)
        parameters, fused = list(model.parameters()), variant == "lspm"
        if fused:
            optimizer = AdamW(parameters, lr=1e-4, clip_norm=CLIP)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def train() -> None:
            with self._autocast(device):
                loss = model.loss(tokens, targets)
            loss.backward()
            if not fused:
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return train

    def results(self, variant: str, device: str, exact: bool = False) -> list[Tensor]:
        """Every token's loss and every parameter's gradient; in float64 where exact."""
        model, tokens, targets = self._model(variant, device)
        model = model.double() if exact else model
        with self._autocast(device, enabled=not exact):
            with torch.no_grad():
                logits = model(tokens) if exact else model(tokens).float()
            loss = model.loss(tokens, targets)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return [losses, *torch.autograd.grad(loss, list(model.parameters()))]

    def peak_bytes(self, variant: str, device: str) -> int | None:
        """The most memory that model, gradients, optimizer and two steps take, in a process of their own."""
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            return pool.submit(_peak_bytes, self, variant, device).result()

    def _autocast(self, device: str, enabled: bool = True) -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=enabled and self.dtype == torch.bfloat16)

    def _model(self, variant: str, device: str) -> tuple[LanguageModelling | HuggingFace, Tensor, Tensor]:
        torch.manual_seed(0)
        if variant in THEIRS:
            model = HuggingFace(self.config, compiled=variant != THEIRS[0])
        else:
            model = make_task(self.config, ops=VARIANTS[variant])
        model.to(device)
        ids = torch.randint(self.config.vocabulary_size, (self.batch, self.tokens + 1), device=device)
        return model, ids[:, :-1], ids[:, 1:]


def _peak_bytes(training: Training, variant: str, device: str) -> int | None:
    # A tiny model first: the libraries that a first step loads belong to nobody's model.
    dataclasses.replace(training, config=TINY, batch=1, tokens=TINY.context).step(variant, device)()

    def train_twice() -> None:
        train = training.step(variant, device)
        train()
        train()

    return machine.peak_bytes(train_twice, device)


def goals(training: Training, row: dict, least: int) -> list[dict]:
    """Of our row beside transformers': the time of the better, and the memory of the better."""
    bound, faster = GOALS[training.dtype], min(row["speedup"][name] for name in THEIRS)
    percent = 100 * row["peak_bytes"] / least
    return [
        {"what": "hugging face", "bound": bound, "got": faster, "met": faster >= bound},
        {"what": "their memory", "bound": MOST_MEMORY, "got": percent, "met": percent <= MOST_MEMORY},
    ]
