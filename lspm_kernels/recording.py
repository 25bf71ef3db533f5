"""Recordings of kernel calls: what a CUDA graph is for a GPU, for the kernels of a CPU."""

from collections.abc import Callable
from contextvars import Token

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lspm_kernels import checks, compiled

# Torch functions whose tensors depend on no other's values: kernels fill them, or they hold a number.
_MAKES = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_MAKES |= {"fill_", "zero_"}
# Those that give values to Python, which may decide by them.
_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr"}
_READS |= {f"__{name}__" for name in "bool int float complex index contains array dlpack".split()}
_WRITES = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
_WRITES |= {"__set__", "__setitem__", "backward"}


class Recording:
    """The calls of CPU kernels within a `with` block, to be made again on the same tensors.

        with torch.no_grad(), Recording() as recording:
            y = step(x)
        x.copy_(another_x)
        recording.replay()  # y now holds what step gives of another_x

    A replay costs one or two microseconds a kernel, where Python takes tens to come to the same call, and its
    kernels share one parallel region, so that threads are woken once. As of a CUDA graph, its tensors stay
    those of the block, and numbers have the values that they had there. What is not an op of this package is
    not made again, views aside: `missed` names the torch functions of the block that computed, wrote or read
    a value, so that a replay is no whole step. While it records, ops check no values that tensors hold;
    kernels do, at each replay.

    Calls of other threads are not recorded, but for those that run in a copy of the block's context, as
    asyncio.to_thread has it.
    """

    def __init__(self):
        self.calls: list[tuple[Callable[..., object], tuple]] = []
        self.missed: list[str] = []
        self._watch = _Watch(self.missed)
        self._token: Token | None = None
        self._threads = 1

    def __enter__(self) -> "Recording":
        if not checks.plain():
            self.missed.append("what traces, transforms or intercepts calls")
        self._threads = torch.get_num_threads()
        self._token = compiled.recorded.set(self.calls)
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)
        compiled.recorded.reset(self._token)

    def replay(self) -> None:
        """Makes the calls again, in their order, on as many threads as torch used when they were recorded."""
        compiled.cpu.run_in_team(self._make, self._threads)

    def _make(self) -> None:
        for function, args in self.calls:
            function(*args)


class _Watch(TorchFunctionMode):
    """Notes the torch functions that a replay misses; those within a recorded call are made again with it."""

    def __init__(self, missed: list[str]):
        super().__init__()
        self._missed = missed

    @torch.compiler.disable  # which compiles no mode: a compiled step runs as it is while it is recorded
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "") or str(function)
        if name != "__get__" and compiled.recorded.get() is not None and not _makes(name, args, kwargs):
            if name in _READS or _writes(name, kwargs) or _computes(result, args, kwargs):
                self._missed.append(name)
        return result


def _makes(name: str, args: tuple, kwargs: dict) -> bool:
    # Not of another tensor's value, as fill_ may be.
    return name in _MAKES and not any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values()))


def _writes(name: str, kwargs: dict) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or kwargs.get("out") is not None


def _computes(result: object, args: tuple, kwargs: dict) -> bool:
    if not isinstance(result, Tensor | tuple | list | dict) or any(result is arg for arg in args):
        return False
    return bool(_storages(result) - _storages((args, kwargs)))


def _storages(tree: object) -> set[int]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel()]
    return {t.untyped_storage()._cdata if t.layout is torch.strided else id(t) for t in tensors}
