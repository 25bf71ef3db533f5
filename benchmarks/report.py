"""Shows result files: as tables, as the tables of the documentation, as plots, and one against another.

    python benchmarks/report.py                       the tables of benchmarks/results/
    python benchmarks/report.py readme [--check]      puts them between the markers of README.md and docs/
    python benchmarks/report.py plot                  a picture of each beside the results
    python benchmarks/report.py compare OLD NEW --fail-above 1.1

markers.py says what the markers are.
"""

import argparse
import sys
from pathlib import Path

import convergence
import growth
import markers
import results
import tables
from markers import ROOT
from results import Rows

from lspm_kernels.__main__ import backends

RESULTS = ROOT / "benchmarks" / "results"


def readme(pages: list[Path], files: list[Rows], check: bool) -> int:
    """Fills the markers of pages; with check it changes none, and gives 1 where one is stale."""
    stale = False
    for page in pages:
        text = page.read_text()
        fresh = markers.filled(text, files, backends)
        if check and fresh != text:
            print(f"{page.name} is stale: run python benchmarks/report.py readme")
            stale = True
        elif fresh != text:
            page.write_text(fresh)
    return 1 if stale else 0


def plot(rows: Rows, folder: Path) -> list[Path]:
    """For each benchmark, a picture of how many times as fast as PyTorch each case is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        if points := [row for row in rows if row["benchmark"] == benchmark and "growth" in row]:
            paths.append(folder / f"{points[0]['machine']}-{benchmark}.png")
            growth.plot(points, paths[-1], tables.about(points))
        if curves := [row for row in rows if row["benchmark"] == benchmark and "losses" in row]:
            paths.append(folder / f"{curves[0]['machine']}-{benchmark}.png")
            convergence.plot(curves, paths[-1], tables.about(curves))
        compared = [row for row in rows if "torch" in (row.get("speedup") or ())]
        bars = [row for row in compared if row["benchmark"] == benchmark]
        if not bars:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(bars)), layout="constrained")
        labels = [f"{row['case']} {row['variant'].removeprefix('lspm-')}" for row in bars]
        axes.barh(labels, [row["speedup"]["torch"] for row in bars], height=0.7)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("times as fast as PyTorch: faster to the right of the line")
        figure.suptitle(tables.about(bars), fontsize=7)
        paths.append(folder / f"{bars[0]['machine']}-{benchmark}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return paths


def show(files: list[Rows]) -> str:
    """Every table of the result files."""
    parts = []
    for rows in files:
        for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
            chosen = [row for row in rows if row["benchmark"] == benchmark]
            parts.append(f"{benchmark}: {tables.about(chosen)}\n\n{tables.table(chosen)}\n")
    return "\n".join(parts) or "No results yet."


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="the result files' folder"
    )
    commands = parser.add_subparsers(dest="command")
    to_readme = commands.add_parser("readme", help="put the tables between the markers of all pages")
    to_readme.add_argument("--check", action="store_true", help="change nothing, exit 1 where it is stale")
    to_readme.add_argument("--file", type=Path, metavar="PATH", help="of one page alone")
    commands.add_parser("plot", help="draw each benchmark")
    to_compare = commands.add_parser("compare", help="exit 1 where NEW is slower than OLD")
    to_compare.add_argument("old", type=Path, metavar="OLD")
    to_compare.add_argument("new", type=Path, metavar="NEW")
    to_compare.add_argument("--fail-above", type=float, default=1.1, metavar="RATIO")
    options = parser.parse_args()
    try:
        return run(options)
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    if options.command == "compare":
        old, new = results.load(options.old), results.load(options.new)
        regressed = results.compare(old, new, options.fail_above)
        print("\n".join(regressed) or f"Nothing takes more than {options.fail_above} times as long.")
        return 1 if regressed else 0
    files = [results.load(path) for path in sorted(options.results.glob("*.json"))]
    if options.command == "readme":
        return readme([options.file] if options.file else markers.pages(), files, options.check)
    if options.command == "plot":
        for rows in files:
            print(*plot(rows, options.results), sep="\n")
    else:
        print(show(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
