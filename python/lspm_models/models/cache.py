"""Keys and values of the tokens that a model has seen, so that a new token does not cost the whole text."""

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
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (B, H, capacity, D) of each layer
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
        if not self.pairs:
            shape = self.layers, self.batch, heads, self.capacity, size
            self.pairs = list(zip(k.new_empty(shape), v.new_empty(shape), strict=True))
        found = []
        for held, new in zip(self.pairs[layer], (k, v), strict=True):
            held.narrow(2, self.length, tokens).copy_(new)
            found.append((held if rows == self.batch else held[:rows]).narrow(2, 0, end))
        return tuple(found)
