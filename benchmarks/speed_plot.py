"""A picture of speeds for the documentation: each case against PyTorch, on each machine."""

import math
from html import escape

from results import Rows

WIDTH, LEFT, RIGHT, LINE, TOP = 760, 400, 20, 17, 34
COLOURS = ("#3f51b5", "#e65100", "#00897b", "#c2185b", "#7b8d00", "#5d4037")
ROUND = 1.15  # the axis goes this far beyond the least and the largest


def svg(files: list[Rows]) -> str:
    """A line for each case, a dot for each kernel and machine, on a logarithmic axis; "" where there is none.

    What was not compared with torch is shown against the first of what else it was.
    """
    dots = [dot for rows in files for dot in map(_dot, rows) if dot]
    if not dots:
        return ""
    cases = list(dict.fromkeys(case for case, _, _ in dots))
    colours = dict(zip(dict.fromkeys(series for _, series, _ in dots), COLOURS * 9, strict=False))
    values = [1.0, *(value for _, _, value in dots)]
    low, high = math.log(min(values) / ROUND), math.log(max(values) * ROUND)

    def across(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (math.log(value) - low) / (high - low), 1)

    height = TOP + LINE * (len(cases) + len(colours)) + 10
    bottom = TOP + LINE * len(cases)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" fill="currentColor" font-size="11">']
    parts.append(f'<text x="{LEFT}" y="12">times as fast as PyTorch: faster to the right of 1</text>')
    for tick in _ticks(math.exp(low), math.exp(high)):
        opacity = 0.9 if tick == 1 else 0.2
        line = f'<path d="M{across(tick)} {TOP - 6}V{bottom}" stroke="currentColor" opacity="{opacity}"/>'
        parts.append(f'{line}<text x="{across(tick)}" y="{TOP - 9}" text-anchor="middle">{tick:g}</text>')
    for place, case in enumerate(cases):
        y = TOP + LINE * place + 11
        parts.append(f'<text x="{LEFT - 12}" y="{y}" text-anchor="end">{escape(case)}</text>')
        for of, series, value in dots:
            if of == case:
                title = f"<title>{escape(series)}: {value:.2f}</title>"
                circle = f'cx="{across(value)}" cy="{y - 4}" r="4.5" fill="{colours[series]}"'
                parts.append(f"<circle {circle}>{title}</circle>")
    for place, (series, colour) in enumerate(colours.items()):
        y = bottom + LINE * place + 18
        parts.append(f'<circle cx="{LEFT + 6}" cy="{y - 4}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 16}" y="{y}">{escape(series)}</text>')
    return "".join([*parts, "</svg>"])


def _dot(row: dict) -> tuple[str, str, float] | None:
    speedup = row.get("speedup") or {}
    if not row["variant"].startswith("lspm") or not speedup:
        return None
    other = "torch" if "torch" in speedup else next(iter(speedup))
    case = row["case"] if other == "torch" else f"{row['case']}, against {other}"
    kernel = row["variant"].removeprefix("lspm-").removeprefix("lspm")
    series = [row["processor"], *([kernel] if kernel and kernel != "cpu" else [])]
    if row.get("forced"):
        series.append("forced")
    return case, ", ".join(series), speedup[other]


def _ticks(low: float, high: float) -> list[float]:
    """Powers of 2, or where they would stand too close, of 10."""
    base = 2 if high / low < 100 else 10
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    return [float(base) ** power for power in powers if low <= float(base) ** power <= high]
