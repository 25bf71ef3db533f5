"""Functions f(q, k, cos, sin) of a model's own file that are a rotary position embedding, by their numbers.

A function is asked if it names its third and fourth argument cos and sin, and believed if, for several shapes
and angles, it gives what lspm_kernels.rotary means, gradients included. Its name counts for nothing.

Tables are mostly as wide as what they turn, each angle twice. The proof says nothing of tables in which the
two differ, so a call shows first that they do not; layers that share tables, as those of transformers do,
show it once.
"""

import inspect
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lspm_kernels import dispatch
from lspm_kernels.acceleration import courses
from lspm_kernels.acceleration.probe import REFUSALS
from lspm_kernels.ops import rotary
from lspm_kernels.reference.rotary import rotary as definition

_PLAIN = {int, bool, type(None)}
# Numbers of q. Of 9 and 3 heads of 64 features, one token: 0.9 times as fast as torch; 2x16 tokens: 1.3, but
# 0.74 in inference mode, where tables have no version, so that none can be kept from one layer to the next.
_LEAST, _LEAST_IN_INFERENCE_MODE = 2**13, 2**16
_ROUNDED = 2e-6  # of the largest, as many compute in float32 whatever is given
# The columns of a table that tell an angle, and those that repeat them.
_HALVES = {
    "halves": (lambda t: t[..., : t.shape[-1] // 2], lambda t: t[..., t.shape[-1] // 2 :]),
    "pairs": (lambda t: t[..., 0::2], lambda t: t[..., 1::2]),
    "once": (lambda t: t, None),
}
_WIDEN = {
    "halves": lambda t: torch.cat((t, t), -1),
    "pairs": lambda t: t.repeat_interleave(2, -1),
    "once": lambda t: t,
}
# (B, H, H_kv, T, D, R, B of the tables); the last turn less than there is, which not all functions do.
_SHAPES = [(2, 4, 2, 5, 8, 8, 2), (2, 3, 1, 7, 6, 6, 1), (1, 5, 5, 2, 16, 16, 1), (3, 2, 2, 1, 4, 4, 3)]
_PARTIAL = [(2, 4, 2, 5, 12, 8, 2), (3, 2, 2, 3, 10, 4, 1)]


@dataclass(frozen=True)
class Rotation:
    """How a function rotates.

    interleaved: as in rotary; form: how tables repeat angles; partial: they may be narrower than q;
    contiguous: whether the outputs always are, or else lie as the inputs do.
    """

    interleaved: bool
    form: str
    partial: bool = False
    contiguous: bool = False


_known: weakref.WeakKeyDictionary[Callable, dict[tuple, Rotation | None]] = weakref.WeakKeyDictionary()
_seen = threading.local()


def rotate(function, *args, **kwargs):
    """function(*args, **kwargs): by our kernel where that is known as a rotation and the kernel takes it."""
    if len(args) != 4 or not _pays(args[0]):
        return function(*args, **kwargs)
    found = known(function, kwargs)
    tables = _tables(found.form, *args[2:]) if found is not None and _takes(found, *args) else None
    if tables is None:
        return function(*args, **kwargs)
    q, k, cos, _ = args
    # Sequences of other positions lie one behind the other in one table.
    starts = None if len(cos) == 1 else torch.arange(len(cos), device=q.device) * cos.shape[1]
    turned = (rotary.rotary(x, *tables, interleaved=found.interleaved, offsets=starts) for x in (q, k))
    return tuple(
        y.contiguous() if found.contiguous or x.is_contiguous() else y
        for x, y in zip((q, k), turned, strict=True)
    )


def known(function: Callable, options: dict) -> Rotation | None:
    """What function(q, k, cos, sin, **options) computes, or None where it is no rotation that was proven."""
    if type(function) is not types.FunctionType or not all(type(o) in _PLAIN for o in options.values()):
        return None
    by_options, key = _known.setdefault(function, {}), tuple(options.items())
    if key not in by_options:
        is_asked = is_suspected(function) and courses.is_told(function)
        by_options[key] = _probed(partial(function, **options)) if is_asked else None
    return by_options[key]


def is_suspected(function: Callable) -> bool:
    """Whether a function's arguments have the names that a rotation's have."""
    if type(function) is not types.FunctionType:
        return False
    return [*inspect.signature(function).parameters][2:4] == ["cos", "sin"]


def _pays(q) -> bool:
    if type(q) is not Tensor:
        return False
    return q.numel() >= (_LEAST_IN_INFERENCE_MODE if torch.is_inference_mode_enabled() else _LEAST)


def _takes(found, q, k, cos, sin) -> bool:
    for x in (q, k, cos, sin):
        if type(x) is not Tensor or x.dtype is not q.dtype or not x.is_cpu:
            return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    return (
        _fit(found, q, k, cos, sin)
        and _lies_as_known(q)
        and _lies_as_known(k)
        and bool(dispatch.admitting("rotary", rotary.BACKENDS, q))
    )


def _fit(found, q, k, cos, sin) -> bool:
    """Whether the shapes are such as were proven."""
    if not q.dim() == k.dim() == 4 or not cos.dim() == sin.dim() == 3 or not k.numel():
        return False
    B, _, T, D = q.shape
    if (k.shape[0], *k.shape[2:]) != (B, T, D) or sin.shape != cos.shape:
        return False
    tables, rows, columns = cos.shape
    R = 2 * columns if found.form == "once" else columns
    narrow = found.partial and 0 < R < D and R % 2 == 0
    return tables in (1, B) and rows == T and (R == D or narrow)


def _lies_as_known(x) -> bool:
    """Whether what torch makes of x lies as ours does: heads inmost, or as they are named."""
    batch, heads, rows, last = x.stride()
    return last == 1 and ((batch >= rows >= heads >= x.shape[3]) or x.is_contiguous())


def _tables(form, cos, sin) -> tuple[Tensor, Tensor] | None:
    """Both tables with each angle once, (S, R / 2), or None where an angle's two numbers differ."""
    if torch.is_inference_mode_enabled() or cos.is_inference() or sin.is_inference():
        return _made(form, cos, sin)
    marks = form, cos._version, sin._version, cos.data_ptr(), sin.data_ptr()
    last = getattr(_seen, "last", None)
    if last is not None and last[0]() is cos and last[1]() is sin and last[2] == marks:
        return last[3]
    with torch.no_grad():
        made = _made(form, cos, sin)
    _seen.last = weakref.ref(cos), weakref.ref(sin), marks, made
    return made


def _made(form, cos, sin):
    once, again = _HALVES[form]
    if again is not None and not all(torch.equal(once(t), again(t)) for t in (cos, sin)):
        return None
    return tuple(once(t).flatten(0, 1).contiguous() for t in (cos, sin))


def _probed(function) -> Rotation | None:
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        for form in _HALVES:
            for interleaved in (False, True):
                if all(_is_right(function, form, interleaved, *shape) for shape in _SHAPES):
                    narrow = all(_is_right(function, form, interleaved, *shape) for shape in _PARTIAL)
                    contiguous = _is_contiguous(function, form)
                    if contiguous is None:
                        return None
                    return Rotation(interleaved, form, narrow, contiguous)
    return None


def _given(form, B, H, H_kv, T, D, R, tables, dtype=torch.float64):
    """q and k, laid out as projections are, and tables of angles that are no angles: any numbers."""
    generator = torch.Generator().manual_seed(B * T + R)
    q, k = (torch.randn(B, T, h, D, generator=generator, dtype=torch.float64) for h in (H, H_kv))
    sizes = torch.logspace(-4, 4, T, dtype=torch.float64)[:, None, None] if T > 2 else 1.0
    cos, sin = (torch.randn(tables, T, R // 2, generator=generator, dtype=torch.float64) for _ in range(2))
    q, k = ((x * sizes).to(dtype).transpose(1, 2) for x in (q, k))
    return q, k, cos.to(dtype), sin.to(dtype)


def _is_right(function, form, interleaved, B, *shape) -> bool:
    q, k, cos, sin = _given(form, B, *shape)
    starts = None if len(cos) == 1 else torch.arange(B) * cos.shape[1]
    angles = cos.flatten(0, 1), sin.flatten(0, 1)
    expected = [definition(x, *angles, interleaved=interleaved, offsets=starts) for x in (q, k)]
    q, k = (x.detach().requires_grad_() for x in (q, k))
    tables = _WIDEN[form](cos), _WIDEN[form](sin)
    kept = [x.detach().clone() for x in (q, k, *tables)]
    state = torch.get_rng_state()
    try:
        found = function(q, k, *tables)
        if type(found) is not tuple or len(found) != 2:
            return False
        douts = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in (q, k)]
        turned = [
            definition(x, angles[0], -angles[1], interleaved=interleaved, offsets=starts) for x in douts
        ]
        grads = torch.autograd.grad(found, (q, k), douts)
    except REFUSALS:
        return False
    same = all(map(torch.equal, kept, (q, k, *tables))) and torch.equal(state, torch.get_rng_state())
    pairs = zip((*found, *grads), (*expected, *turned), strict=True)
    return same and all(_is_close(one, other) for one, other in pairs)


def _is_close(one, other) -> bool:
    if type(one) is not Tensor or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one - other).abs() <= _ROUNDED * other.abs().amax(-1, keepdim=True)).all())


def _is_contiguous(function, form) -> bool | None:
    """Whether outputs of half the width are contiguous, whatever the inputs are; None: or else."""
    q, k, cos, sin = _given(form, *_SHAPES[0], dtype=torch.bfloat16)
    tables = _WIDEN[form](cos), _WIDEN[form](sin)
    found = function(q, k, *tables)
    if any(y.dtype != q.dtype for y in found):
        return None
    given = function(q.contiguous(), k.contiguous(), *tables)
    if not all(y.is_contiguous() for y in given):
        return None
    if all(y.is_contiguous() for y in found):
        return True
    return False if all(y.transpose(1, 2).is_contiguous() for y in found) else None
