"""Masks for the models of transformers that stay unwritten while a window and padding say all of them."""

import sys
from functools import cache, partial
from types import FunctionType

import torch
from torch import Tensor


class WindowMask:
    """A bool mask (B, 1, T_q, T_k) as a window and the keys that padding hides: memory O(T_k), no more.

    Only attention_forward reads it so. An operator, a method or a function of torch that touches it gets the
    mask as sdpa_mask writes it (eager_mask: without_sdpa says where), and from then on so does
    attention_forward. It is no Tensor, since compiled code would read a tensor's memory.

    Attributes:
        shape: (B, 1, T_q, T_k).
        window: (left, right) of lspm_kernels.attention: the last query stands at the last of the keys.
        keys: how many keys queries may see; what a static cache has behind them is empty.
        padding: bool (B, 1, 1, keys), True where a key is no padding; or None.
        dtype: of the mask as it is written.
    """

    ndim, requires_grad = 4, False

    def __init__(self, shape, window, keys, padding, dtype, write):
        self.shape, self.dtype = torch.Size(shape), dtype
        self.window, self.keys, self.padding = window, keys, padding
        self._write, self._written = write, None

    def written(self) -> Tensor:
        """The mask itself, always the same tensor, so that what a model writes into it is kept."""
        if self._written is None:
            self._written = self._write()
        return self._written

    def arguments(self, query: Tensor, key: Tensor) -> tuple[int, tuple | None, Tensor | None]:
        """(keys, window, mask): what attention takes for query and key; all keys where it is written."""
        given = query.shape[0], 1, query.shape[2], key.shape[2]
        if self._written is not None or tuple(self.shape) != given:
            return key.shape[2], None, self.written()
        return self.keys, self.window, self.padding

    def contiguous(self) -> "WindowMask":
        """Itself: transformers asks it of every mask for a static cache."""
        return self

    def __getattr__(self, name):
        if name.startswith("_"):  # a copy asks for some before it has any
            raise AttributeError(name)
        return getattr(self.written(), name)

    def __getitem__(self, index):
        return self.written()[index]

    def __invert__(self):
        return ~self.written()

    def __and__(self, other):
        return self.written() & other

    def __or__(self, other):
        return self.written() | other

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.written, (args, kwargs or {}))
        return function(*args, **kwargs)


def window_mask(masks, **arguments) -> WindowMask | Tensor | None:
    """What sdpa_mask gives for its arguments, but unwritten where they prove it a window with padding.

    Args:
        masks: transformers.masking_utils.
        arguments: sdpa_mask's, by name.
    """
    if isinstance(arguments.get("attention_mask"), WindowMask):  # made already, by generate()
        return arguments["attention_mask"]
    config = arguments.get("config")
    like_eager = without_sdpa(type(config))
    # gemma4 cuts queries, and masks with them, before layers that share keys: there None hides other keys.
    cut = arguments.get("q_length") != 1 and bool(getattr(config, "num_kv_shared_layers", None))
    mask = _unwritten(masks, like_eager, not (like_eager or cut), **arguments)
    if cut:
        arguments["allow_is_causal_skip"] = False
    if mask is not None or not like_eager:
        return mask or masks.sdpa_mask(**arguments)
    if arguments.get("q_length") == 1 and masks.sdpa_mask(**arguments) is None:  # a lone query sees all
        return None
    return masks.eager_mask(**arguments)


def without_sdpa(config: type) -> bool:
    """Whether the model that a config is of is known not to support transformers' "sdpa".

    Its attention need not tell whether it is causal then, and may be its own code: masks are to be as for
    "eager", where None hides nothing and what is written is added to scores.
    """
    return _without_sdpa(config)


@cache
def _without_sdpa(config):
    name = config.__module__.replace("configuration_", "modeling_")
    own = (c for c in vars(sys.modules.get(name, sys)).values() if getattr(c, "__module__", None) == name)
    found = [c._supports_sdpa for c in own if hasattr(c, "_supports_sdpa")]
    return bool(found) and not any(found)


def _unwritten(
    masks, like_eager, none_is_causal, *, batch_size, kv_length, q_length=None, q_offset=0, kv_offset=0,
    mask_function=None, attention_mask=None, local_size=None, allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False, **rest,
) -> WindowMask | None:  # fmt: skip
    """The mask where it is proven a window that hides something, else None."""
    # transformers before 5 tells no q_length; a graph that is traced must hold for other values and lengths.
    if q_length is None or any(masks.is_tracing(x) for x in (q_offset, attention_mask)):
        return None
    # Neither is allowed in a step over a static cache, which is compiled for masks of one shape.
    allowed = allow_is_causal_skip or allow_is_bidirectional_skip
    window = _window(masks, mask_function, local_size) if allowed else None
    if window is None:
        return None
    q_offset = int(q_offset)  # a static cache gives its own count, which the first layer's keys raise
    shift = q_offset - kv_offset  # the first query's place among the keys
    keys = shift + q_length if window[1] == 0 else kv_length
    if window != (None, None) and not (shift >= 0 and shift + q_length == keys <= kv_length):
        return None
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + keys]
        if padding.dtype != torch.bool or tuple(padding.shape) != (batch_size, keys):
            return None
        padding = None if padding.all() else padding[:, None, None]
    # Here None says as much: a causal mask is then taken to begin at the first key, a lone query to see all.
    placed = shift == 0 and none_is_causal if q_length > 1 else keys == kv_length
    if padding is None and (local_size is None or kv_length < local_size) and (placed or window[1] is None):
        return None
    given = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
        "local_size": local_size, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False,
    }  # fmt: skip
    shape = batch_size, 1, q_length, kv_length
    dtype = rest.get("dtype", torch.float32) if like_eager else torch.bool
    write = partial(masks.eager_mask if like_eager else masks.sdpa_mask, **given, **rest)
    return WindowMask(shape, window, keys, padding, dtype, write)


def _window(masks, mask_function, size) -> tuple[int | None, int | None] | None:
    """(left, right) of a mask function that is one of transformers' own; of any other None."""
    if mask_function is masks.causal_mask_function:
        return None, 0
    if mask_function is masks.bidirectional_mask_function:
        return None, None
    if type(size) is not int or size < 1:
        return None
    if _same(mask_function, masks.sliding_window_causal_mask_function(size)):
        return size - 1, 0
    if _same(mask_function, masks.sliding_window_bidirectional_mask_function(size)):
        return size, size
    return None


def _same(one, other) -> bool:
    """Whether two functions are one code over the same variables, so that they give the same."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other)]
        return one.__code__ is other.__code__ and _same(*map(tuple, cells))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) is int and one == other)
