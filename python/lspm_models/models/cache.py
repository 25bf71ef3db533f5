"""Keys and values of the tokens that a model has seen, so that a new token does not cost the whole text."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer, in tensors that are written in place.

    The first tokens decide about heads, dtype and device. A batch of one is written to every row: the shared
    prompt of several sequences runs once. Without gradients only, as its tensors are overwritten.

    Args:
        layers: layers of the model.
        batch: B, the sequences that continue.
        capacity: tokens it has room for.
    """

    def __init__(self, layers: int, batch: int, capacity: int):
        self.layers, self.batch, self.capacity = layers, batch, capacity
        self.length = 0  # tokens held by every layer; the model moves it on when the last layer is done
        # The same in tensors that stay where they are, for steps that are recorded: as look-ups take it, and
        # as attention does.
        self._places = torch.zeros(batch, 1, dtype=torch.int64)
        self._counts = torch.zeros(batch, dtype=torch.int32)
        self.past: int | Tensor = 0  # length, as attention takes it of the tokens that the model now runs
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (B, H, capacity, D) of each layer
        self.rotation: tuple[Tensor, Tensor] | None = None  # the model's, of every place up to the capacity

    def begin(self, tokens: Tensor) -> int | Tensor:
        """Gives where the first of tokens (B or 1, T) stands, as look-ups take it.

        Raises:
            ValueError: there is no room for T more tokens.
        """
        end = self.length + tokens.shape[1]
        if end > self.capacity:
            raise ValueError(f"KeyValueCache: tokens must fit the capacity of {self.capacity}, got {end}")
        is_step = tokens.is_cpu and tokens.shape == self._places.shape  # a GPU would wait for what they hold
        self.past = self._counts if is_step else self.length
        return self._places if is_step else self.length

    def pair(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What holds a layer's keys and values, of as many rows as k and v (B or 1, H, T, D) have."""
        if not self.pairs:
            shape = self.layers, self.batch, k.shape[1], self.capacity, k.shape[-1]
            self.pairs = list(zip(k.new_empty(shape), v.new_empty(shape), strict=True))
        keys, values = self.pairs[layer]
        rows = len(k)
        return (keys, values) if rows == self.batch else (keys[:rows], values[:rows])

    def advance(self, tokens: Tensor) -> None:
        """Every layer holds tokens (B or 1, T) now."""
        end = self.length + tokens.shape[1]
        if len(tokens) < self.batch:
            for pair in self.pairs:
                for held in pair:
                    held[1:, :, self.length : end] = held[:1, :, self.length : end]
        self.length = end
        self._places.fill_(end)
        self._counts.fill_(end)
