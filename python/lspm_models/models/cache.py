"""Keys and values of the tokens that a model has seen, so that a new token does not cost the whole text."""

from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer, in two tensors (layers, B, H, capacity, D) that are written in place.

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
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.rotation: tuple[Tensor, Tensor] | None = None  # the model's, of every place up to the capacity

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v, both (B or 1, H, T, D), and gives all keys and values so far of the rows in k.

        Raises:
            ValueError: there is no room for T more tokens.
        """
        rows, heads, tokens, size = k.shape
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"KeyValueCache: tokens must fit the capacity of {self.capacity}, got {end}")
        if self.keys is None:
            self.keys = k.new_empty(self.layers, self.batch, heads, self.capacity, size)
            self.values = v.new_empty(self.layers, self.batch, heads, self.capacity, size)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]
