"""What a person sees while a model trains: a bar on a terminal, and lines that stay."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable


class Progress:
    """A progress bar on stderr where that is a terminal, and lines through `report`; silent without it.

    Args:
        report: takes a line for the reader, or None.
        done: the share of the run that is done already.
        unit: what the speed counts.
    """

    def __init__(self, report: Callable[[str], None] | None, done: float = 0.0, unit: str = "token") -> None:
        self._report, self._bar, self._unit = report, None, unit
        self._began, self._done = time.monotonic(), done
        if report is not None and sys.stderr.isatty():
            from tqdm import tqdm

            size = shutil.get_terminal_size()  # tqdm shows nothing in a terminal that does not tell its size
            look = {"bar_format": "{bar:24} {desc}", "leave": False, "mininterval": 0.2}
            look |= {"ncols": size.columns, "nrows": size.lines}
            self._bar = tqdm(total=1.0, initial=done, **look)

    def update(self, done: float, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the bar to the share `done` and shows loss, speed and the time left."""
        if self._bar is None:
            return
        spent = time.monotonic() - self._began
        left = spent * (1 - done) / (done - self._done) if done > self._done else float("inf")
        speed = f"{quantity(tokens_per_second)} {self._unit}s/s"
        self._bar.set_description_str(
            f"step {step}  loss {loss:.3f}  {speed}  {duration(left)} left", refresh=False
        )
        self._bar.update(min(done, 1.0) - self._bar.n)

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._report is None:
            return
        if self._bar is not None:
            self._bar.clear()
        self._report(text)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()


def quantity(value: float) -> str:
    """Returns a number as people say it: 950, 12.3k, 4.56M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def counted(count: int, thing: str) -> str:
    """Returns a number of things: 1 layer, 2,000 layers, 2 classes."""
    return f"{count:,} {thing}" + ("" if count == 1 else "es" if thing.endswith("s") else "s")


def duration(seconds: float) -> str:
    """Returns a time as people say it: 08:15, 3:08:15, or --:-- where it is not known."""
    if seconds == float("inf"):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
