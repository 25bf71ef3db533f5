"""The one rule that picks a backend: the first row of an op's table whose stated limits admit the call.

A row states its limits as data; no kernel is tried to see whether it fails. What no row admits is computed by
the op's reference, with one FallbackWarning for each reason.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

_forced: ContextVar[str | None] = ContextVar("lspm_backend", default=None)
# The same for torch.compile: that of torch 2.13 reads no context variable, but it guards what is in a list.
_forced_in_traces: list[str | None] = [None]
_warned: set[str] = set()
# The rows that take tensors of a device and dtype on this machine, by (op, device, dtype): asked for at every
# call, and only the limits on the arguments can change from one to the next.
_admitted: dict[tuple, tuple["Backend", ...]] = {}

REFERENCE = "reference"


class FallbackWarning(UserWarning):
    """No kernel admits a call, so plain PyTorch computes it."""


@dataclass(frozen=True)
class Limit:
    """What a backend needs of an op's arguments: `needs` in words, `holds` and `got` as functions of them."""

    needs: str
    holds: Callable[..., bool]
    got: Callable[..., object]


@dataclass(frozen=True)
class Backend:
    """A row of an op's table.

    forward and backward take the tensors of the op's contract, outputs allocated; an op without a gradient,
    or one whose gradient other kernels give, has no backward, and the forward of one that works in place is
    its kernel <op>_update. missing() says why the row cannot run on this machine at all, or gives None.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    forward: Callable[..., None]
    backward: Callable[..., None] | None
    missing: Callable[[], str | None]
    limits: tuple[Limit, ...] = field(default=())

    def refusal(self, op: str, *args) -> str | None:
        """Why this row does not take the call `op(*args)`; None if it does. args begin with a tensor."""
        reason = self.refusal_of(args[0])
        for limit in () if reason else self.limits:
            if not limit.holds(*args):
                reason = f"{limit.needs}, got {limit.got(*args)}"
                break
        return f"{op}: {self.name} needs {reason}" if reason else None

    def refusal_of(self, x: torch.Tensor) -> str | None:
        """What a tensor or this machine lacks for this row, whatever the other arguments are."""
        if x.device.type != self.device:
            return f"a tensor on {self.device}, got {x.device}"
        if x.dtype not in self.dtypes:
            return f"dtype {', '.join(map(dtype_name, self.dtypes))}, got {dtype_name(x.dtype)}"
        if x.layout is not torch.strided:
            return f"strided memory, got layout {dtype_name(x.layout)}"
        return self.missing()


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def pick(
    op: str, backends: tuple[Backend, ...], requested: str | None, *args, first: str | None = None
) -> Backend | None:
    """The row that runs `op(*args)`; None stands for the reference.

    first: the name of a row that is faster than those before it for what is special about args.

    Raises:
        ValueError: no row has the requested name.
        NotImplementedError: the requested row does not take this call.
    """
    requested = forced() if requested is None else requested
    if requested is not None:
        return _requested(op, backends, requested, *args)
    rows = admitting(op, backends, args[0])
    if first is not None and len(rows) > 1:
        rows = sorted(rows, key=lambda row: row.name != first)
    for row in rows:
        if all(limit.holds(*args) for limit in row.limits):
            return row
    if not args[0].is_meta:  # a meta tensor has no data: there is nothing that a kernel could do faster
        refusals = "; ".join(row.refusal(op, *args) for row in backends)
        _warn(f"{refusals}: {op} runs on plain PyTorch")
    return None


def admitting(op: str, backends: tuple[Backend, ...], x: torch.Tensor) -> tuple[Backend, ...]:
    """The rows that take tensors such as x on this machine, by the other arguments or not."""
    key = (op, x.device, x.dtype, x.layout)
    known = {} if torch.compiler.is_compiling() else _admitted  # a graph is guarded by what it reads there
    rows = known.get(key)
    if rows is None:
        rows = known[key] = tuple(row for row in backends if row.refusal_of(x) is None)
    return rows


def forced() -> str | None:
    """What use_backend was given, within it."""
    return _forced_in_traces[0] if torch.compiler.is_compiling() else _forced.get()


def _requested(op: str, backends: tuple[Backend, ...], requested: str, *args) -> Backend | None:
    if requested == REFERENCE:
        return None
    for row in backends:
        if row.name == requested:
            if refusal := row.refusal(op, *args):
                raise NotImplementedError(refusal)
            return row
    names = ", ".join([*(row.name for row in backends), REFERENCE])
    raise ValueError(f"{op}: backend must be one of {names}, got {requested!r}")


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, FallbackWarning, stacklevel=4)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op called within runs on the backend `name` ("cpu", "cuda", "triton", "reference") or raises."""
    token, outer = _forced.set(name), _forced_in_traces[0]
    _forced_in_traces[0] = name
    try:
        yield
    finally:
        _forced.reset(token)
        _forced_in_traces[0] = outer
