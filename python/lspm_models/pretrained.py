"""Models that others trained, in the formats of others: the face these have, and how their weights get in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lspm_models.data.tokenizers import Tokenizer
from lspm_models.language_models import Config, Task, make_model, make_task


class Pretrained(ABC):
    """A model in a file or a folder.

    Attributes:
        where: what messages call the place.
        config: its shape.
        shapes: of the tensors, by the file's names; transposed where ours are.
    """

    where: str
    config: Config
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def named(self, name: str) -> str:
        """Returns what the file calls a tensor of our state dict."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Returns a tensor by the file's name, in any dtype, as our state dict has it."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that lies beside the weights, or raises ValueError."""

    def task(self) -> Task:
        """Makes the task in float32, in eval mode, with the weights.

        Raises:
            ValueError: tensors are missing, unknown, or of another shape; the message names them.
        """
        return self._made(lambda: make_task(self.config))

    def model(self) -> nn.Module:
        """Makes the model alone, from tokens to features, as task does; tensors of heads are passed over."""
        parts = self._made(lambda: nn.ModuleDict({"model": make_model(self.config)}), self.heads())
        return parts["model"]

    def heads(self) -> Collection[str]:
        """Returns the file's names of what is no part of the model below its heads."""
        return ()

    def load(self, task: Task) -> None:
        """Copies the weights into a task; see task."""
        self._check(task)
        self._fill(task)

    def _made(self, make: Callable[[], nn.Module], left_out: Collection[str] = ()) -> Any:
        if self.config.layers > len(self.shapes):  # so that a wrong number does not cost time
            got = f"{self.config.layers} for {len(self.shapes)} tensors"
            raise ValueError(f"pretrained: layers of {self.where} must have tensors, got {got}")
        with torch.device("meta"):  # nothing is allocated before the shapes are known to be right
            module = make()
        self._check(module, left_out)
        self._fill(module.to_empty(device="cpu"))
        return module.eval()

    def _fill(self, module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            tensor.copy_(self.read(self.named(name)))

    def _check(self, module: nn.Module, left_out: Collection[str] = ()) -> None:
        wanted = {self.named(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if missing := [name for name in wanted if name not in self.shapes]:
            raise ValueError(f"pretrained: {self.where} must hold {_few(missing)}, got none of them")
        if extra := [name for name in self.shapes if name not in wanted and name not in left_out]:
            raise ValueError(f"pretrained: {self.where} must hold no other tensors, got {_few(extra)}")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                got = f"{self.shapes[name]} in {self.where}"
                raise ValueError(f"pretrained: {name} must have the config's shape {shape}, got {got}")


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
