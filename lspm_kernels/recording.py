"""Recordings of kernel calls: what a CUDA graph is for a GPU, for the kernels of a CPU."""

from collections.abc import Callable
from contextvars import ContextVar, Token

_current: ContextVar["Recording | None"] = ContextVar("lspm_recording", default=None)


class Recording:
    """The calls of CPU kernels within a `with` block, to be made again on the same tensors.

        with torch.no_grad(), Recording() as recording:
            y = step(x)
        x.copy_(another_x)
        recording.replay()  # y now holds what step gives of another_x

    A replay costs one or two microseconds a kernel, where Python takes tens to come to the same call. As of a
    CUDA graph, its tensors stay those of the block, and numbers have the values that they had there. What is
    not an op of this package is not made again, views aside: whoever records compares a replay with the
    function itself before he believes it. While it records, ops check no values that tensors hold;
    kernels do, at each replay.

    Calls of other threads are not recorded.
    """

    def __init__(self):
        self.calls: list[tuple[Callable[..., object], tuple]] = []
        self._token: Token | None = None

    def __enter__(self) -> "Recording":
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    def replay(self) -> None:
        """Makes the calls again, in their order."""
        for function, args in self.calls:
            function(*args)


def is_on() -> bool:
    """Whether calls of this thread are recorded."""
    return _current.get() is not None


def call(function: Callable[..., object], *args: object) -> None:
    """Calls function, and again at each replay of the recording that is on."""
    function(*args)
    if (recording := _current.get()) is not None:
        recording.calls.append((function, args))
