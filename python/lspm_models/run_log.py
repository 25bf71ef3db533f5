"""What a run writes down for people: a CSV file, TensorBoard events and a plot of the losses."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path

from lspm_models.files import replaced, write_atomically

SECONDS_BETWEEN_PLOTS = 30


def columns(unit: str = "token", metrics: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the columns of a log: what `unit` counts, and what is measured beside the validation loss."""
    before = ("step", "train_loss", "validation_loss", *metrics, "learning_rate", "gradient_norm")
    return (*before, f"{unit}s", f"{unit}s_per_second", "seconds")


class RunLog:
    """The log of one run: log.csv, tensorboard/ and loss.png in its folder.

    Args:
        folder: the run folder.
        step: rows after this step, of a process that was killed behind its last checkpoint, are removed.
        unit: what is counted: token, image.
        metrics: names of what is measured beside the validation loss.

    Raises:
        ValueError: a log that goes on is not one, or of other columns.
    """

    def __init__(
        self, folder: Path, step: int = 0, *, unit: str = "token", metrics: Sequence[str] = ()
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self._unit, self._columns = self.folder / "log.csv", unit, columns(unit, metrics)
        rows = _checked(self.path, self._columns) if step else []
        rows = [row for row in rows if int(row["step"]) <= step]
        lines = [",".join(self._columns), *(",".join(row[name] for name in self._columns) for row in rows)]
        write_atomically(self.path, ("\n".join(lines) + "\n").encode())
        self._file = self.path.open("a")
        self._plotted = time.monotonic()
        self._events = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else None)

    def write(self, **values: float) -> None:
        """Appends a row; a column that is not given stays empty. Numbers read back exactly."""
        cells = (repr(values[name]) if name in values else "" for name in self._columns)
        self._file.write(",".join(cells) + "\n")
        self._file.flush()  # the operating system has the row: killing this process cannot take it back
        for name in self._columns[1:-3]:
            if name in values:
                self._events.add_scalar(name, values[name], values["step"])

    def plot(self) -> None:
        """Draws the losses so far, but not all the time: drawing takes as long as some steps."""
        if time.monotonic() - self._plotted > SECONDS_BETWEEN_PLOTS:
            self._draw()

    def close(self) -> None:
        """Draws the plot and closes the files."""
        self._draw()
        self._file.close()
        self._events.close()

    def _draw(self) -> None:
        self._events.flush()
        plot_losses(self.path, self.folder / "loss.png", self.folder.name, self._unit)
        self._plotted = time.monotonic()


def read_log(path: Path) -> list[dict[str, str]]:
    """Returns the whole rows of a log; the last line may have been cut by a kill."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _checked(path: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a log that goes on; a ValueError where someone else has written into it."""
    try:
        rows = read_log(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"log: {path} must be a CSV file in UTF-8, got {error}") from None
    for row in rows:
        if missing := [name for name in names if row.get(name) is None]:
            raise ValueError(f"log: {path} must have {missing[0]} in each row, got {_shown(row)}")
        for name in names:
            if not _is_number(row[name], whole=name == "step") and (row[name] or name == "step"):
                kind = "a whole number" if name == "step" else "a number or nothing"
                raise ValueError(f"log: {path} must have {kind} as {name}, got {row[name]!r}")
    return rows


def _shown(row: dict[str, str]) -> str:
    return repr(",".join(str(value) for value in row.values() if value is not None)[:60])


def _is_number(text: str, *, whole: bool) -> bool:
    try:
        int(text) if whole else float(text)
    except ValueError:
        return False
    return True


def plot_losses(log: Path, image: Path, title: str, unit: str = "token") -> None:
    """Draws training and validation loss over the steps.

    Args:
        log: a log.csv.
        image: the PNG to write.
        title: stands above the plot.
        unit: what a loss is the mean over.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_log(log)
    training = [(int(row["step"]), float(row["train_loss"])) for row in rows if row["train_loss"]]
    validation = [(int(row["step"]), float(row["validation_loss"])) for row in rows if row["validation_loss"]]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss (nats per {unit})", title=title)
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8)
        axes.plot(
            steps, _smooth(losses), color="#08519c", label=f"training, smoothed: {_smooth(losses)[-1]:.3f}"
        )
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, "o-", color="#d94801", markersize=4, label=f"validation: {losses[-1]:.3f}")
    if training or validation:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with replaced(image) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _smooth(losses: tuple[float, ...]) -> list[float]:
    """Returns a moving average over the last fiftieth of the run, without the lag of the first steps."""
    decay = 1 - 1 / max(1, len(losses) / 50)
    smoothed, value, weight = [], 0.0, 0.0
    for loss in losses:
        value, weight = decay * value + (1 - decay) * loss, decay * weight + (1 - decay)
        smoothed.append(value / weight)
    return smoothed
