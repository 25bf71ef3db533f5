"""Keys and values of the tokens that a model has seen, so that a new token does not cost the whole text."""

from collections.abc import Callable

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
        self.rotation: tuple[Tensor, Tensor] | None = None  # the model's, of every place

    def attend(
        self,
        layer: int,
        attention_with_kv_cache: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Appends k and v, and gives q's causal attention to all keys so far.

        Args:
            layer: whose keys.
            attention_with_kv_cache: lspm_kernels' or its like.
            q: (B or 1, H, T, D).
            k, v: (B or 1, H_kv, T, D).
            rotation: cosines and sines (positions, D / 2) by which q and k are rotated first.

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
        cos, sin = rotation or (None, None)
        caches = self.keys[layer], self.values[layer]
        y = attention_with_kv_cache(
            q, *(cache[:rows] for cache in caches), k, v, cache_seqlens=self.length, cos=cos, sin=sin,
            causal=True,
        )  # fmt: skip
        if rows < self.batch:
            for cache in caches:
                cache[rows:, :, self.length : end] = cache[:rows, :, self.length : end]
        return y
