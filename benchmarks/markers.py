"""The markers of README.md and docs/, between which generated tables stand.

`<!-- results:begin NAME PATTERN ... -->` takes the cases of benchmark NAME that match a pattern, all where it
has none, and ends at `<!-- results:end NAME -->`; with `forced` for `results` it takes those that were
measured under a forced instruction set, and is brief. `<!-- headline:begin PATTERN ... -->` takes cases of
any benchmark, each on every machine that has it, and ends at `<!-- headline:end -->`. What `python -m
lspm_kernels backends` prints comes between `<!-- backends:begin OP -->` and `<!-- backends:end -->`, of one
op or of all, and in short between `<!-- support:begin -->` and `<!-- support:end -->`.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import tables
from results import Rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = re.compile(
    r"(?P<begin><!-- (?P<kind>results|forced):begin (?P<name>[\w-]+)(?P<patterns>[^>]*?) -->\n)"
    r".*?(?P<end><!-- (?P=kind):end (?P=name) -->)",
    re.S,
)
HEADLINE = re.compile(r"(<!-- headline:begin([^>]*?)-->\n).*?(<!-- headline:end -->)", re.S)
BACKENDS = re.compile(r"(<!-- backends:begin ?(\w*) -->\n).*?(<!-- backends:end -->)", re.S)
SUPPORT = re.compile(r"(<!-- support:begin -->\n).*?(<!-- support:end -->)", re.S)


def pages() -> list[Path]:
    """Every page that has markers, or may have."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, files: list[Rows], backends: Callable[[], str]) -> str:
    """text with its tables between its markers."""

    def results(match: re.Match) -> str:
        forced = match["kind"] == "forced"
        parts = [
            f"{tables.about(rows)}\n\n{tables.table(rows, markdown=True, brief=forced)}\n"
            for rows in chosen(match, files)
        ]
        return match["begin"] + "\n".join(parts or ["No results yet.\n"]) + match["end"]

    def headline(match: re.Match) -> str:
        found = (fitting(rows, [pattern], forced=False) for pattern in match[2].split() for rows in files)
        return f"{match[1]}{tables.headline(found)}\n{match[3]}"

    def of_op(match: re.Match) -> str:
        head, rule, *lines = backends().splitlines()
        lines = [line for line in lines if not match[2] or line.startswith(f"| {match[2]} |")]
        return "\n".join([match[1] + head, rule, *lines, match[3]])

    text = SUPPORT.sub(lambda match: f"{match[1]}{support(backends())}\n{match[2]}", text)
    return BACKENDS.sub(of_op, HEADLINE.sub(headline, RESULTS.sub(results, text)))


def support(backends: str) -> str:
    """Ops by what they run on, from the table of backends."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for line in backends.splitlines()[2:]:
        op, backend, _, dtypes, *_ = line.strip("| ").split(" | ")
        rows.setdefault(op, []).append((backend, dtypes))
    groups: dict[tuple[str, str], list[str]] = {}
    for op, of_op in rows.items():
        names = ", ".join(name for name in ("cpu", "cuda", "triton") if name in dict(of_op))
        groups.setdefault((names, of_op[0][1]), []).append(f"[{op}](docs/ops/{op}.md)")
    lines = [f"| {names} | {dtypes} | {', '.join(of)} |" for (names, dtypes), of in sorted(groups.items())]
    return "\n".join(["| kernels | dtypes | ops |", "| --- | --- | --- |", *lines])


def chosen(match: re.Match, files: list[Rows]) -> Iterable[Rows]:
    """The rows that a match of RESULTS asks for, of each file that has such."""
    for rows in files:
        of_name = [row for row in rows if row["benchmark"] == match["name"]]
        found = fitting(of_name, match["patterns"].split() or ["*"], forced=match["kind"] == "forced")
        if found:
            yield found


def fitting(rows: Rows, patterns: list[str], *, forced: bool) -> Rows:
    """The rows of cases that fit a pattern."""
    return [
        row
        for row in rows
        if bool(row.get("forced")) == forced and any(fnmatch.fnmatchcase(row["case"], p) for p in patterns)
    ]
