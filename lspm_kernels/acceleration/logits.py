"""Logits that are computed only if something reads them: what a language model's head gives to its loss.

While training, the output of a head is mostly asked for one thing, its cross entropy, which
linear_cross_entropy gives without the matrix. So the head gives Logits, which keep what they are made of, and
become a tensor, with its graph, the moment anything else is asked of them.
"""

import contextlib
import weakref
from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.ops.linear_cross_entropy import linear_cross_entropy

# Whether the forward that is running is that of a model that computes its loss.
_collecting: ContextVar[bool] = ContextVar("lspm_logits", default=False)
is_collecting = _collecting.get
_MATRIX = 2


class _Origin:
    """What Logits and all that are parts of the same matrix have in common."""

    def __init__(self, bias: Tensor | None, weight: Tensor, hidden: Tensor):
        device = hidden.device
        self.weight, self.bias = weight, bias
        self.autocast = torch.get_autocast_dtype(device.type) if checks.autocasts(device) else None
        self.made_of = tuple((t, t._version) for t in (hidden, weight, bias) if t is not None)
        self.members: list[weakref.ref[Logits]] = []
        self.gave_loss = False
        self.is_tensor = False

    def check(self) -> None:
        """Refuses what was written to since, as by an optimizer: of it come other logits than were given."""
        if any(t._version != version for t, version in self.made_of):
            rule = "logits must be read before what they are computed of changes, as in an optimizer's step"
            raise RuntimeError(f"accelerate: {rule}: read them earlier, or deny their head")


class Logits(Tensor):
    """hidden @ weight.T + bias, of shape (..., N), without data: functions of torch get the tensor."""

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "Logits":
        """The logits of hidden (..., D) for weight (N, D) and bias (N,), in the dtype of their product."""
        origin = _Origin(bias, weight, hidden)

        def product() -> Tensor:
            origin.check()
            kind, chosen = hidden.device.type, origin.autocast
            with torch.enable_grad(), torch.autocast(kind, chosen, chosen is not None):
                return F.linear(hidden, weight, bias)

        return Logits._made(origin, hidden, dtype, product)

    @staticmethod
    def _made(origin, hidden, dtype, make) -> "Logits":
        shape = *hidden.shape[:-1], len(origin.weight)
        self = Tensor._make_wrapper_subclass(Logits, shape, dtype=dtype, device=hidden.device)
        self._origin, self._hidden, self._make, self._tensor = origin, hidden, make, None
        origin.members.append(weakref.ref(self))
        return self

    @property
    def gave_loss(self) -> bool:
        """Whether a loss was computed of them, or of a part, without the matrix."""
        return self._origin.gave_loss

    def tensor(self) -> Tensor:
        """The matrix. Parts become tensors at the same time, for what is written into one is in all."""
        self._origin.is_tensor = True
        for member in [reference() for reference in self._origin.members]:
            if member is not None and member._tensor is None:
                member._tensor = member._make()
        return self._tensor

    def _part(self, hidden: Tensor, dtype: torch.dtype, derive: Callable[[Tensor], Tensor]) -> "Logits":
        return Logits._made(
            self._origin, hidden, dtype, lambda: derive(self._tensor)
        )  # older: it is one first

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _OF_METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        first = args[0] if args else None
        if function in _LAZY and type(first) is Logits and not first._origin.is_tensor:
            found = _LAZY[function](*args, **kwargs)
            if found is not None:
                return found
        if function in _OF_GRADIENTS:
            _refuse_gradient(function, args)
        return _read(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if not torch.is_grad_enabled():  # else the graph, which is made above this, would lack them
            return _read(function, args, kwargs or {})
        raise RuntimeError(
            f"accelerate: logits must be read by functions of torch, got {function} beneath them:"
            " logits + 0 is a plain tensor"
        )


def _read(function, args, kwargs):
    args, kwargs = torch.utils._pytree.tree_map_only(Logits, Logits.tensor, (args, kwargs))
    return function(*args, **kwargs)


def _refuse_gradient(function, args):
    """The loss was not computed of the tensor that they become: its gradient would lack it in silence."""
    wanted = args[1] if function is torch.autograd.grad else args[0]
    given = wanted if isinstance(wanted, tuple | list) else [wanted]
    if any(type(t) is Logits and t.gave_loss for t in given):
        rule = "logits must not be asked for a gradient once their loss was computed without them"
        raise RuntimeError(f"accelerate: {rule}, got {function.__name__}: deny their head")


def _view(logits, *shape):
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not sizes or not all(isinstance(size, int) for size in sizes) or sizes[-1] != logits.shape[-1]:
        return None
    hidden = logits._hidden.reshape(*sizes[:-1], logits._hidden.shape[-1])
    return logits._part(hidden, logits.dtype, lambda tensor: tensor.reshape(*hidden.shape[:-1], sizes[-1]))


def _item(logits, index):
    """A part, where the index leaves the last dimension alone."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return None
    dims, whole = logits.dim(), slice(None)
    if Ellipsis in parts:
        leaves_last = len(parts) > 1 and parts[-1] == whole
    else:
        leaves_last = len(parts) < dims or (len(parts) == dims and parts[-1] == whole)
    if not leaves_last:
        return None
    return logits._part(logits._hidden[index], logits.dtype, lambda tensor: tensor[index])


def _to(logits, *args, **kwargs):
    return logits if not kwargs and args == (logits.device,) else None


def _float(logits):
    if logits.dtype == torch.float32:
        return logits
    return logits._part(logits._hidden, torch.float32, Tensor.float)


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
    label_smoothing=0.0,
):  # fmt: skip
    """torch.nn.functional.cross_entropy of logits (M, N), where linear_cross_entropy has it."""
    origin = input._origin
    if input.dim() != _MATRIX or size_average is not None or reduce is not None:
        return None
    if type(target) is not Tensor or target.dim() != 1 or target.dtype != torch.int64:
        return None
    if len(target) != len(input._hidden) or (weight is not None and weight.dtype != torch.float32):
        return None
    origin.check()
    origin.gave_loss = True
    with torch.enable_grad():
        loss = linear_cross_entropy(
            input._hidden, origin.weight, target, bias=origin.bias, class_weight=weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
    return loss if origin.autocast is not None else loss.to(input.dtype)


_OF_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.__hash__,
}  # fmt: skip
_LAZY = {
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.__getitem__: _item,
    Tensor.to: _to,
    Tensor.float: _float,
    Tensor.contiguous: lambda logits: logits,
    Tensor.requires_grad.__get__: lambda _: True,
    F.cross_entropy: _cross_entropy,
}


_OF_GRADIENTS = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad}


@contextlib.contextmanager
def collected():
    """Within, heads give Logits."""
    token = _collecting.set(True)
    try:
        yield
    finally:
        _collecting.reset(token)


def settled(output):
    """What a model gives: Logits of which no loss was computed become tensors, as another graph is theirs."""
    if type(output) is Logits:
        return output if output.gave_loss else output.tensor()
    if type(output) in (tuple, list):
        return type(output)(map(settled, output))
    if isinstance(output, dict):
        for key, value in list(output.items()):
            if type(value) is Logits and not value.gave_loss:
                output[key] = value.tensor()
    return output
