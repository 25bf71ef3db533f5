"""Logits that are computed only if something reads them: what a language model's head gives to its loss.

While training, the output of a wide linear layer is mostly asked for one thing, its cross entropy, which
linear_cross_entropy gives without the matrix. So the head gives Logits, which keep what they are made of, and
become a tensor the moment anything else is asked of them.
"""

import contextlib
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels.ops.linear_cross_entropy import linear_cross_entropy

# The logits made in the forward that is running, where that is one of a model that computes its loss.
scope: ContextVar[list | None] = ContextVar("lspm_logits", default=None)


class Logits:
    """hidden @ weight.T + bias, of shape (..., N): a stand-in for the tensor.

    Attributes:
        read: whether anything was computed of them without the matrix.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self._made_of, self.dtype = (hidden, weight, bias), dtype
        kind = hidden.device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._tensor: Tensor | None = None
        self.read = [False]  # one for all that are views of the same

    # isinstance(logits, Tensor) is asked by what then treats it as one.
    __class__ = property(lambda self: Tensor)

    @property
    def shape(self) -> torch.Size:
        hidden, weight, _ = self._made_of
        return torch.Size((*hidden.shape[:-1], len(weight)))

    ndim = property(lambda self: len(self.shape))
    device = property(lambda self: self._made_of[0].device)
    requires_grad = property(lambda self: True)

    def tensor(self) -> Tensor:
        """The matrix, with its graph."""
        if self._tensor is None:
            kind = self._made_of[0].device.type
            with torch.enable_grad(), torch.autocast(kind, self._autocast, self._autocast is not None):
                self._tensor = F.linear(*self._made_of).to(self.dtype)
        return self._tensor

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def float(self) -> "Logits":
        return self._like(self._made_of[0], torch.float32)

    def to(self, *args, **kwargs) -> "Logits | Tensor":
        return self if not kwargs and args == (self.device,) else self.tensor().to(*args, **kwargs)

    def contiguous(self) -> "Logits":
        return self

    def view(self, *shape) -> "Logits | Tensor":
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if not sizes or not isinstance(sizes[-1], int) or sizes[-1] != self.shape[-1]:
            return self.tensor().view(*shape)
        hidden = self._made_of[0]
        return self._like(hidden.reshape(*sizes[:-1], hidden.shape[-1]), self.dtype)

    reshape = view

    def __getitem__(self, index):
        """Logits still, where the index leaves the last dimension alone."""
        parts = index if isinstance(index, tuple) else (index,)
        plain = all(part is Ellipsis or isinstance(part, int | slice) for part in parts)
        whole = len(parts) < self.dim() if Ellipsis not in parts else False
        if plain and (whole or (len(parts) > 1 and parts[-1] == slice(None))):
            return self._like(self._made_of[0][index], self.dtype)
        return self.tensor()[index]

    def cross_entropy(self, target, weight, ignore_index, reduction, label_smoothing) -> Tensor:
        """torch.nn.functional.cross_entropy of logits (M, N), without them."""
        self.read[0] = True
        hidden, matrix, bias = self._made_of
        loss = linear_cross_entropy(
            hidden, matrix, target, bias=bias, class_weight=weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
        return loss.to(torch.float32 if self._autocast is not None else self.dtype)

    def _like(self, hidden, dtype):
        made = object.__new__(Logits)
        made.__dict__.update(self.__dict__, _made_of=(hidden, *self._made_of[1:]), dtype=dtype, _tensor=None)
        return made

    def __getattr__(self, name):
        if name.startswith("_"):  # a copy asks for some before it has any
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __reduce_ex__(self, protocol):
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.tensor().__deepcopy__(memo)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy and (loss := _cross_entropy(*args, **kwargs)) is not None:
            return loss
        if function is Tensor.size or function is Tensor.dim:
            return getattr(args[0], function.__name__)(*args[1:], **kwargs)
        args, kwargs = torch.utils._pytree.tree_map(tensor_of, (args, kwargs))
        return function(*args, **kwargs)


def tensor_of(x):
    """The tensor that Logits stand for; anything else as it is."""
    return x.tensor() if type(x) is Logits else x


def _operator(name):
    def method(self, *others):
        return getattr(self.tensor(), name)(*map(tensor_of, others))

    return method


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor".split()
_OPERATORS = [*_BINARY, *(f"r{name}" for name in _BINARY), *"neg abs invert lt le gt ge eq ne".split()]
for _name in (*_OPERATORS, *"len iter bool float int repr format setitem array contains".split()):
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))
Logits.__hash__ = object.__hash__


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
    label_smoothing=0.0,
):  # fmt: skip
    """The loss where linear_cross_entropy has it, else None."""
    if type(input) is not Logits or input.dim() != 2 or size_average is not None or reduce is not None:
        return None
    if type(target) is not Tensor or target.dim() != 1 or target.dtype != torch.int64:
        return None
    if weight is not None and weight.dtype != torch.float32:
        return None
    return input.cross_entropy(target, weight, ignore_index, reduction, label_smoothing)


@contextlib.contextmanager
def collected():
    """Within, heads give Logits."""
    token = scope.set([])
    try:
        yield
    finally:
        scope.reset(token)


def settled(output):
    """What a model gives: Logits of which no loss was computed become tensors, as another graph is theirs."""
    if type(output) is Logits:
        return output if output.read[0] else output.tensor()
    if type(output) is tuple:
        return tuple(map(settled, output))
    if type(output) is list:
        return list(map(settled, output))
    if isinstance(output, dict):
        for key, value in list(output.items()):
            if type(value) is Logits and not value.read[0]:
                output[key] = value.tensor()
    return output
