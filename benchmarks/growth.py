"""Ratings of any number, generated and sorted on disk, and a picture of the speed of passes over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from results import Rows

import lspm_kernels
from lspm_kernels import RatingBlocks
from lspm_models.data.mapped_ratings import write_ratings

BATCH = 10_000_000
STEP = {"mean": 3.0, "lr": 0.005, "reg": 0.02}


@dataclass(frozen=True)
class Growth:
    """A pass over so many generated ratings of a catalogue of a fixed size."""

    ratings: int
    factors: int
    users: int = 400_000
    items: int = 20_000

    def __str__(self) -> str:
        return f"mf_scale/pass/float32/N{self.ratings}-K{self.factors}"

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        for begin in range(0, self.ratings, BATCH):
            n = min(BATCH, self.ratings - begin)
            ids = [
                (size * torch.rand(n, generator=generator) ** 1.5).int().clamp(max=size - 1)
                for size in (self.users, self.items)
            ]
            yield *ids, 1 + 4 * torch.rand(n, generator=generator)

    def tables(self) -> list[torch.Tensor]:
        torch.manual_seed(0)
        factors = [0.1 * torch.randn(n, self.factors) for n in (self.users, self.items)]
        return [*factors, torch.zeros(self.users), torch.zeros(self.items)]

    def bytes(self, blocks: RatingBlocks) -> int:
        """Each rating read; and the row of a user read and written once in each block that has ratings of the
        user, as a block's users are more than the caches hold. Rows of items are left out: those of all
        items may stay in the last of the caches."""
        visits = 1 + int(torch.count_nonzero(blocks.users[1:] != blocks.users[:-1]))
        return 12 * self.ratings + 2 * 4 * (self.factors + 1) * visits

    def written(self, folder: Path) -> RatingBlocks:
        return write_ratings(folder, self.batches(), num_users=self.users, num_items=self.items)


def peak_mebibytes(run: Growth, folder: Path) -> float:
    """Of this process, whose getrusage() would begin with what its parent had."""
    lspm_kernels.mf_sgd_(*run.tables(), run.written(folder), **STEP)
    return machine.resident_bytes("VmHWM") / 2**20


def plot(rows: Rows, path: Path, about: str) -> None:
    """Draws updates a second over ratings of 64 factors, and over factors of ten million ratings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    chosen = ("ratings", "factors", 64), ("factors", "ratings", 10**7)
    for axis, (across, fixed, value) in zip(axes, chosen, strict=True):
        points = sorted(
            (row["growth"] for row in rows if row["growth"][fixed] == value), key=lambda g: g[across]
        )
        for side in ("memory", "disk"):
            axis.plot(
                [p[across] for p in points], [p[side] for p in points], marker="o", label=f"from {side}"
            )
        axis.set_xscale("log")
        axis.set_xticks([p[across] for p in points], [f"{p[across]:,}" for p in points], minor=False)
        axis.minorticks_off()
        axis.set_xlabel(f"{across}, {fixed} {value:,}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("million updates a second")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(about, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
