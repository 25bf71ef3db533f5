"""Times of a model's variants: interleaved rounds, medians, peak memory, a table and a plot of them."""

import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lspm_kernels.bench_target import UsageError

_SECONDS_A_TURN = 0.05  # so many calls at least that a clock's own error is small beside them


def turn(step: Callable[[], object], device: torch.device) -> Callable[[int], float]:
    """A function of a number of calls that gives the seconds of one."""

    def run(calls):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        _synchronize(device)
        return (time.perf_counter() - start) / calls

    return run


def measure(turns: dict[str, Callable[[int], float]], rounds: int, device: torch.device) -> dict[str, dict]:
    """Times in interleaved rounds, each in the reverse order of the last, and peak memory.

    Args:
        turns: functions of a number of calls that give the seconds of one; the first is what others are
            compared with.
    """
    for turn in turns.values():
        turn(1)
    slowest = max(turn(1) for turn in turns.values())
    calls, names = max(1, round(_SECONDS_A_TURN / slowest)), list(turns)
    seconds = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in reversed(names) if number % 2 else names:
                seconds[name].append(turns[name](calls))
    finally:
        gc.enable()
    gc.collect()
    rows = {}
    for name, times in seconds.items():
        ratios = [base / mine for base, mine in zip(seconds[names[0]], times, strict=True)]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive") if rounds > 1 else times * 3
        rows[name] = {
            "median_ms": 1e3 * statistics.median(times), "low_ms": 1e3 * low, "high_ms": 1e3 * high,
            "speedup": statistics.median(ratios), "rounds": rounds, "calls": calls,
            "peak_bytes": _peak_bytes(lambda turn=turns[name]: turn(1), device),
        }  # fmt: skip
    return rows


def _peak_bytes(function, device):
    """The most memory in use at once beyond what was before; None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists() or platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # sets VmHWM to VmRSS: proc(5)
    field = lambda name: int(re.search(rf"{name}:\s*(\d+)", status.read_text())[1]) * 1024  # noqa: E731
    before = field("VmRSS")
    function()
    return max(0, field("VmHWM") - before)


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows):
    """The rows of measure, to be read."""
    lines = [f"{'':10s}{'median ms':>11s}{'quartiles':>20s}{'speedup':>9s}{'peak MiB':>10s}"]
    for name, row in rows.items():
        spread = f"{row['low_ms']:.2f} - {row['high_ms']:.2f}"
        peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        lines.append(f"{name:10s}{row['median_ms']:11.2f}{spread:>20s}{row['speedup']:8.2f}x{peak:>10s}")
    return "\n".join(lines)


def pyplot():
    """matplotlib's.

    Raises:
        UsageError: it is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib (pip install 'lspm-kernels[models]'), got none") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(path: Path, title: str, rows: dict[str, dict]) -> None:
    """Writes the rows of measure as bars."""
    figure, axes = pyplot().subplots(1, 2, figsize=(8, 1.2 + 0.5 * len(rows)))
    names = list(rows)[::-1]
    for axis, what, scale in zip(axes, ("median_ms", "peak_bytes"), (1, 2**-20), strict=True):
        bars = axis.barh(names, [(rows[n][what] or 0) * scale for n in names])
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.margins(x=0.15)
    axes[0].set_xlabel("ms, median")
    axes[1].set_xlabel("MiB, peak")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot().close(figure)
