"""Modules whose own forward calls what a kernel does, or adds and normalises: the same forward, remade.

Nothing is traced. The source of the forward is changed in these places alone, and each still evaluates what
it evaluated: `f(q, k, cos, sin)` becomes `rotate(f, q, k, cos, sin)`, which calls f unless f is what was
proven and the kernel takes the call. So forwards of any course, with caches and arguments of any kind, can be
remade, and what is exchanged later, a function of the file or a module, counts.
"""

import functools
import types
from collections.abc import Callable

import torch
from torch import nn

from lspm_kernels.acceleration import attentions, rotations, source, sums
from lspm_kernels.acceleration.image_kernels import is_special
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.places import Places
from lspm_kernels.acceleration.statements import Unproven
from lspm_kernels.acceleration.swap import Swap, original

_is_compiling = torch.compiler.is_compiling
_GIVEN: dict[str, Callable] = {
    "_lspm_attend": attentions.attend,
    "_lspm_rotate": rotations.rotate,
    "_lspm_sum_and_norm": sums.sum_and_norm,
    "_lspm_norm_of_sum": sums.norm_of_sum,
}


class Remade:
    """A module whose forward is its own, remade; `lspm` are the paths of the norms in it."""

    def forward(self, *args, **kwargs):
        if _is_compiling() or is_special():
            return super().forward(*args, **kwargs)
        own = self.lspm_original.forward
        function = _remade(own, self.lspm) if type(own) is types.FunctionType else None
        if function is None:
            return super().forward(*args, **kwargs)
        return function(self, *args, **kwargs)


@functools.cache
def _remade(forward: Callable, norms: frozenset[tuple[str, ...]]) -> Callable | None:
    """None where the forward that the class has now cannot be remade."""
    try:
        return _changed(forward, norms)[1]
    except Unproven:
        return None


@functools.cache
def _places(forward: Callable) -> Places | str:
    """Where a forward may be changed, or why it cannot."""
    try:
        return _changed(forward, None)[0]
    except Unproven as reason:
        return str(reason)


def _changed(forward: Callable, norms: frozenset[tuple[str, ...]] | None) -> tuple[Places, Callable]:
    """Where a forward was changed, and the forward that this gives."""
    inner = source.unwrapped(forward)
    tree = source.tree_of(inner)
    places = Places(inner, tree, norms)
    places.change()
    return places, source.remade(forward, tree, _GIVEN)


def rule(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """For modules of any class but torch.nn's."""
    cls = original(module)
    if cls.__module__.startswith("torch.nn.") or type(cls.forward) is not types.FunctionType:
        return None
    places = _places(cls.forward)
    if isinstance(places, str):
        return None
    norms = {p: found for p in places.norms if (found := sums.norm_of(_member(module, p))) is not None}
    said = [*places.said, *dict.fromkeys(f"add_{found.kind}" for found in norms.values())]
    if not said:
        return places.refused
    return Swap(Remade, f"its own forward with {', '.join(said)}", frozenset(norms))


def _member(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module
