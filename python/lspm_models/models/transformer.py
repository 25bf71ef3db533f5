"""The model around its blocks: what decoders and encoders share, and the decoder."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lspm_models.models.blocks import Rotation
from lspm_models.models.cache import KeyValueCache
from lspm_models.models.operations import Operations


class Transformer(nn.Module):
    """What decoders and encoders share: kernels, first weights, and what they take for tokens.

    A subclass has `config`, with vocabulary_size and context, `embedding` and `blocks`.

    Args:
        ops: kernels.
        gradient_checkpointing: keep only each block's inputs for the backward, which runs the blocks again.
    """

    def __init__(self, ops: Operations, gradient_checkpointing: bool):
        super().__init__()
        self.ops, self.gradient_checkpointing = ops, gradient_checkpointing

    @property
    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stages(self) -> list[list[nn.Module]]:
        """What stands before the blocks, the embeddings, and each block, as fine-tuning freezes them."""
        before = takewhile(lambda part: self.blocks[0] not in part.modules(), self.children())
        return [list(before), *([block] for block in self.blocks)]

    def initialize(self, outputs: tuple[str, ...]) -> None:
        """GPT-2's: normal with deviation 0.02, 0 in biases, 1 in norms.

        Args:
            outputs: names of the layers that add to the residual, whose deviation is over sqrt(additions).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                additions = 2 * len(self.blocks) if name.split(".")[-2] in outputs else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(additions))

    def check(self, tokens: Tensor, past: int = 0) -> None:
        """Raises ValueError unless tokens are (B, T) ids and, behind `past` others, fit the context."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            got = f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
            raise ValueError(f"{self._name}: tokens must be (B, T) int64, got {got}")
        end = past + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"{self._name}: tokens must fit the context of {self.config.context}, got {end}")

    @property
    def _name(self) -> str:
        return type(self).__name__


class Decoder(Transformer):
    """Features of each token from the tokens up to it; a subclass has `norm` too."""

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Features after the final norm.

        Under autocast the residual stream has autocast's dtype, as in a model whose parameters have it.

        Args:
            tokens: (B, T) int64 ids; T, and the cache's length, together at most the context.
            cache: the tokens before these; it is extended by them. Only under torch.no_grad().

        Returns:
            (B, T, C).

        Raises:
            ValueError: tokens or cache break a rule above.
        """
        if cache is not None and torch.is_grad_enabled():
            raise ValueError(f"{self._name}: cache must be used under torch.no_grad(), got gradients enabled")
        self.check(tokens, cache.length if cache is not None else 0)
        past = cache.begin(tokens) if cache is not None else 0
        with ids_of(self._name, tokens=(tokens, self.config.vocabulary_size)):
            x, residual = in_autocast(self.embedded(tokens, past)), None
        rotation = self.rotation(tokens.shape[1], cache)
        for block in self.blocks:
            if self.gradient_checkpointing and cache is None:
                x, residual = checkpoint(block, x, residual, None, rotation, use_reentrant=False)
            else:
                x, residual = block(x, residual, cache, rotation)
        if cache is not None:
            cache.advance(tokens)
        return self.norm(x, residual)[0]

    def rotation(self, places: int, cache: KeyValueCache | None) -> Rotation | None:
        """Cosines and sines of so many places, or all of a cache, which keeps them; None: no rotation."""

    def embedded(self, tokens: Tensor, past: int | Tensor) -> Tensor:
        """Embeddings (B, T, C) of tokens whose first one stands at `past`, with what tells their places."""
        return self.ops.embedding(tokens, self.embedding.weight)


@contextmanager
def ids_of(model: str, **tables: tuple[Tensor | None, int]) -> Iterator[None]:
    """Within, a look-up's error says which id has no row: tables are ids and a number of rows by argument."""
    try:
        yield
    except (IndexError, ValueError):  # the look-up checks each id anyway
        for name, (ids, rows) in tables.items():
            if ids is not None:
                least, most = ids.aminmax()
                if least < 0 or most >= rows:
                    wrong = least if least < 0 else most
                    raise ValueError(f"{model}: {name} must be in [0, {rows}), got {wrong}") from None
        raise


def in_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
