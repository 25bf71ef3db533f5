"""How the speed of a pass of mf_sgd_ grows with ratings and with factors, in memory and from disk.

Of the copy rate is how long copying the bytes that a pass must move takes, of the time of a pass. The peak is
that of a process that sorts the ratings on disk and trains from there, its files' pages included.
"""

import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import command
import growth
import machine
import tables as tables_of
import torch

import harness
from lspm_kernels import mf_sgd_
from lspm_models.data.mapped_ratings import open_ratings


def measure(run: growth.Growth, device: str, smoke: bool) -> list[dict]:
    """Compares the bits of passes from disk and in memory, and times them in turn."""
    with tempfile.TemporaryDirectory(dir=machine.ROOT) as name:
        folder = Path(name) / "ratings"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(growth.peak_mebibytes, run, folder).result()
        mapped = open_ratings(folder)
        sides = {"disk": mapped, "memory": mapped.copy()}
        tables = {side: run.tables() for side in sides}
        for side, blocks in sides.items():
            mf_sgd_(*tables[side], blocks, **growth.STEP)
        if not all(torch.equal(*both) for both in zip(*tables.values(), strict=True)):
            raise harness.WrongError("a pass from disk gives other bits than one in memory")
        turns = {
            side: harness.repeated(partial(mf_sgd_, *tables[side], blocks, **growth.STEP), device)
            for side, blocks in sides.items()
        }
        moved, move = run.bytes(sides["memory"]), machine.copy_roof(device)
        turns["roof"] = lambda calls: harness.repeated(partial(move, calls * moved), device)(1)
        seconds = harness.interleave(turns, 1, 1 if smoke else None)
    rates = {side: run.ratings / statistics.median(seconds[side]) / 1e6 for side in sides}
    of_roof = 100 * harness.median_ratio(seconds["roof"], seconds["memory"])
    columns = {
        "case": str(run),
        "in memory, M updates/s": tables_of.number(rates["memory"]),
        "from disk, M updates/s": tables_of.number(rates["disk"]),
        "disk takes": f"{harness.median_ratio(seconds['disk'], seconds['memory']):.2f} times as long",
        "of the copy rate": f"{of_roof:.0f} %",
        "peak, MiB": f"{peak:,.0f}",
    }
    point = {"ratings": run.ratings, "factors": run.factors, **rates}
    return [{"case": str(run), "variant": "lspm-cpu", "columns": columns, "growth": point}]


def cases(smoke: bool = False) -> Iterator[growth.Growth]:
    if smoke:
        yield growth.Growth(2000, 8, users=100, items=50)
        return
    yield from (growth.Growth(10**n, 64) for n in range(5, 9))
    yield from (growth.Growth(10**7, factors) for factors in (16, 32, 128, 256, 512))


if __name__ == "__main__":
    machine.keep_freed_memory()
    sys.exit(command.main("mf_scale", __doc__, cases, measure))
