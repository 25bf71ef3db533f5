"""Recordings of kernel calls: what a CUDA graph is for a GPU, for the kernels of a CPU."""

from collections.abc import Callable
from contextvars import Token

import torch

from lspm_kernels import compiled


class Recording:
    """The calls of CPU kernels within a `with` block, to be made again on the same tensors.

        with torch.no_grad(), Recording() as recording:
            y = step(x)
        x.copy_(another_x)
        recording.replay()  # y now holds what step gives of another_x

    A replay costs one or two microseconds a kernel, where Python takes tens to come to the same call, and its
    kernels share one parallel region, so that threads are woken once. As of a CUDA graph, its tensors stay
    those of the block, and numbers have the values that they had there. What is not an op of this package is
    not made again, views aside: whoever records compares a replay with the function itself before he believes
    it. While it records, ops check no values that tensors hold; kernels do, at each replay.

    Calls of other threads are not recorded.
    """

    def __init__(self):
        self.calls: list[tuple[Callable[..., object], tuple]] = []
        self._token: Token | None = None
        self._threads = 1

    def __enter__(self) -> "Recording":
        self._threads = torch.get_num_threads()
        self._token = compiled.recorded.set(self.calls)
        return self

    def __exit__(self, *_: object) -> None:
        compiled.recorded.reset(self._token)

    def replay(self) -> None:
        """Makes the calls again, in their order, on as many threads as torch used when they were recorded."""
        compiled.cpu.run_in_team(self._make, self._threads)

    def _make(self) -> None:
        for function, args in self.calls:
            function(*args)
