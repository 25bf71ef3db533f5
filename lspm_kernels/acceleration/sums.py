"""A residual sum and the norm of it, where a module's own forward has one after the other."""

import operator
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lspm_kernels import dispatch
from lspm_kernels.acceleration.aliases import unhooked
from lspm_kernels.acceleration.image_kernels import is_special
from lspm_kernels.acceleration.lookalikes import Meaning, meaning
from lspm_kernels.acceleration.swap import OF_EVERY_MODULE, original
from lspm_kernels.nn.calls import alike
from lspm_kernels.ops import layer_norm

# layer_norm behind a sum of 16x768: 0.98 with its backward, rms_norm 0.91 without; of 64x768 1.2 to 2.0.
_LEAST = 2**14
# A module -> (names of what it held when it was asked, that itself, what it computes).
_known: WeakKeyDictionary[nn.Module, tuple[tuple, tuple, Meaning | None]] = WeakKeyDictionary()


def norm_of(module: object) -> Meaning | None:
    """What a module is, where that is a norm with a weight."""
    if not isinstance(module, nn.Module) or not unhooked(module):
        return None
    names, values = _state(module)
    known = _known.get(module)
    if known is None or known[0] != names or not all(map(operator.is_, known[1], values)):
        found = meaning(module)
        is_norm = found is not None and found.eps is not None and found.weight is not None
        known = _known[module] = names, values, found if is_norm else None
    return known[2]


def _state(module) -> tuple[tuple, tuple]:
    """What says that a module computes what it did: names, and options, each the same if it is the object."""
    own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
    parameters = (name for name, p in module._parameters.items() if p is not None)
    return (original(module), *own, None, *parameters), tuple(own.values())


def sum_and_norm(norm: object, x, y) -> tuple:
    """(x + y, norm(x + y)), or (x + y, None) where the norm is to be called as it was."""
    if type(x) is not Tensor or type(y) is not Tensor or x.numel() < _LEAST or not _fit(x, y):
        return x + y, None
    found = norm_of(norm)
    if found is None or is_special():
        return x + y, None
    weight = getattr(norm, found.weight)
    bias = None if found.bias is None else getattr(norm, found.bias)
    if not alike(x, weight, bias) or x.shape[-1:] != weight.shape:
        return x + y, None
    weight = weight + found.offset if found.offset else weight
    eps = getattr(norm, found.eps)
    if found.kind == "rms_norm":
        normed, total = layer_norm.add_rms_norm(x, y, weight, eps)
    else:
        normed, total = layer_norm.add_layer_norm(x, y, weight, bias, eps)
    return total, normed


def norm_of_sum(norm: object, x, y):
    """norm(x + y)."""
    total, normed = sum_and_norm(norm, x, y)
    return norm(total) if normed is None else normed


def _fit(x, y) -> bool:
    """Whether a kernel adds them on a CPU, and gives memory that lies as torch's sum does."""
    return (
        x.is_cpu
        and x.shape == y.shape
        and x.dtype is y.dtype
        and x.is_contiguous()
        and y.is_contiguous()
        and bool(dispatch.admitting("rms_norm", layer_norm.BACKENDS, x))
    )
