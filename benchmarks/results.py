"""Result files: a list of rows, one for each variant of each case, each row on a line of its own."""

import json
from pathlib import Path

Rows = list[dict]
PREDICTED = ("roofline", "sass")  # benchmarks whose rows are predictions: they have no time


def load(path: Path) -> Rows:
    return json.loads(path.read_text())


def save(path: Path, rows: Rows) -> None:
    """Puts rows into a result file, in the place of older rows of the same cases.

    Raises:
        ValueError: the file has another machine's rows.
    """
    kept = load(path) if path.exists() else []
    if strangers := {row["machine"] for row in kept} - {row["machine"] for row in rows}:
        raise ValueError(f"save: {path} must hold one machine's results, got {', '.join(sorted(strangers))}")
    again = {(row["benchmark"], row["case"]) for row in rows}
    everything = [row for row in kept if (row["benchmark"], row["case"]) not in again] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in everything) + "\n]\n")


def compare(old: Rows, new: Rows, fail_above: float) -> list[str]:
    """Our kernels that take more than fail_above times as long in `new` as in `old`, or have no time there.

    Raises:
        ValueError: the two are of different machines.
    """
    machines = [", ".join(sorted({row["machine"] for row in rows})) for rows in (old, new)]
    if machines[0] != machines[1]:
        raise ValueError(f"compare: OLD and NEW must be of one machine, got {machines[0]} and {machines[1]}")
    times = _times(new)
    regressed = []
    for (case, kernel), before in _times(old).items():
        now = times.get((case, kernel))
        if now is None:
            regressed.append(f"{case} {kernel}: {before:,.4g} us, now no time")
        elif now > fail_above * before:
            regressed.append(
                f"{case} {kernel}: {before:,.4g} us, now {now:,.4g} us, {now / before:.2f} times"
            )
    return regressed


def _times(rows: Rows) -> dict[tuple[str, str], float]:
    return {
        (row["case"], row["variant"]): row["median_us"]
        for row in rows
        if row["variant"].startswith("lspm") and "median_us" in row
    }
