"""Rows as tables, for a terminal or for a page."""

from collections.abc import Iterable

from results import PREDICTED, Rows

GOALS = {
    "speedup": "x torch >= {:.2f}",
    "roof": "roof >= {:.0f} %",
    "extra_us": "more <= {:.0f} us",
    "better": "x the better {1:.2f} >= {0:.2f}",
    "hugging face": "x Hugging Face {1:.2f} >= {0:.2f}",
    "ctranslate2": "x CTranslate2 {1:.2f} >= {0:.2f}",
    "llama.cpp": "x llama.cpp {1:.2f} >= {0:.2f}",
    "libmf": "x LIBMF {1:.2f} >= {0:.2f}",
    "surprise": "x Surprise {1:.0f} >= {0:.0f}",
    "openvino": "x OpenVINO {1:.2f} >= {0:.2f}",
    "their memory": "memory {1:.0f} <= {0:.0f} % of transformers'",
    "memory": "memory {1:.0f} <= {0:.0f} % of torch's",
}


BRIEF = ("case", "us", "torch, us", "x torch")
HEADLINE = ("case", "on", "kernel", "us", "torch, us", "x torch", "x compile", "goals")


def table(rows: Rows, markdown: bool = False, brief: bool = False) -> str:
    """One line for each of our kernels in each case, with the command that prints it again.

    "x torch" is how many times as fast as torch it is, "more" how much longer a call takes than torch's.
    brief: no other columns than BRIEF.
    """
    if rows and "columns" in rows[0]:
        lines = [row["columns"] | {"again": row["command"]} for row in rows]
    else:
        torch = {row["case"]: row for row in rows if row["variant"] == "torch"}
        lines = [_line(row, torch.get(row["case"])) for row in rows if row["variant"].startswith("lspm")]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    columns = [column for column in columns if any(line.get(column) for line in lines)]
    columns = [column for column in columns if column in BRIEF or not brief]
    columns.sort(key=lambda column: column == "again")  # last; the rest as they are
    grid = [columns, *([line.get(column, "") for column in columns] for line in lines)]
    return _markdown(grid) if markdown else _aligned(grid)


def headline(parts: Iterable[Rows]) -> str:
    """One Markdown table of many benchmarks' cases and machines; the commands are on the cases' pages."""
    lines = []
    for rows in parts:
        torch = {row["case"]: row for row in rows if row["variant"] == "torch"}
        for row in rows:
            if row["variant"].startswith("lspm"):
                line = _line(row, torch.get(row["case"])) | {"on": row["processor"]}
                lines.append([line.get(column, "") for column in HEADLINE])
    return _markdown([list(HEADLINE), *lines])


def about(rows: Rows) -> str:
    """Where, with what and when the rows were made."""
    first = rows[0]
    versions = [f"{name} {first[name]}" for name in ("torch", "triton", "gcc") if first[name]]
    commits = dict.fromkeys(f"commit {row['commit']} of {row['date']}" for row in rows)
    label = "Predicted, not measured: " if first["benchmark"] in PREDICTED else ""
    forced = f" under {first['forced']}" if first.get("forced") else ""
    where = f"{first['processor']}, {first['threads']} threads{forced}"
    return f"{label}{where}; {', '.join([*versions, *commits])}"


def _line(row: dict, torch: dict | None) -> dict[str, str]:
    start = {"case": row["case"], "kernel": row["variant"].removeprefix("lspm-")}
    if "wrong" in row:
        return start | {"goals": f"WRONG, so no time: {row['wrong']}", "again": row["command"]}
    times = [number(row[name]) for name in ("median_us", "low_us", "high_us")]
    speedup = row["speedup"]
    return start | {
        "us": f"{times[0]} ({times[1]} to {times[2]})",
        "torch, us": number(torch["median_us"]) if torch else "",
        "x torch": f"{speedup['torch']:.2f}" if torch else "",
        "x compile": f"{speedup['compile']:.2f}" if "compile" in speedup else "",
        "more, us": "" if row["rate"] else f"{row['extra_us']:+.1f}",
        "rate": f"{number(row['rate'])} {row['unit']}" if row["rate"] else "",
        "of roof": f"{row['roof_percent']:.0f} % {row['roof']}" if row["roof"] else "",
        "MiB": mebibytes(row["peak_bytes"]),
        "torch, MiB": mebibytes(torch["peak_bytes"]) if torch else "",
        "goals": ", ".join(_goal(goal) for goal in row["goals"]),
        "again": row["command"],
    }


def _goal(goal: dict) -> str:
    text = GOALS.get(goal["what"], f"x {goal['what']} {{1:.2f}} >= {{0:.2f}}")
    return f"{text.format(goal['bound'], goal['got'])} {'pass' if goal['met'] else 'MISS'}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}"


def _aligned(grid: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in grid)


def _markdown(grid: list[list[str]]) -> str:
    head, *lines = grid
    if head[-1] == "again":
        lines = [[*line[:-1], f"`{line[-1]}`"] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
