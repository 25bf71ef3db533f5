"""The pages say what is so: Python runs, commands exist, tables are fresh, links lead somewhere."""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import docstrings
import pytest
import report

import lspm_kernels

ROOT = Path(__file__).parents[1]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/cuda_on_cpu/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OPS = sorted(path.stem for path in (ROOT / "lspm_kernels" / "ops").glob("[a-z]*.py"))
INDEX = (ROOT / "docs/ops/index.md").read_text()
LISTED = re.findall(r"^\| \[`(\w+)\(.*?\)`\]\((\w+)\.md\) .*\| (.*?) \| (.*?) \|$", INDEX, re.M)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def pages_with(language):
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_code_runs(page):
    """That of one page in one namespace."""
    exec("\n".join(blocks(page, "python")), {"__name__": "page"})


def commands(page):
    """Its lines that begin with a script of ours, variables in place, without comments."""
    variables = {}
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            if set_ := re.match(r'(\w+)="(.*)"$', line):
                variables[set_[1]] = set_[2]
            for name, value in variables.items():
                line = line.replace(f"${name}", value)  # noqa: PLW2901
            line = line.replace("python -m lspm_kernels ", "python lspm_kernels/__main__.py ")  # noqa: PLW2901
            if command := re.match(r"(?:\w+=\w+ )*python ((?:[a-z]\w+)/.*)", line):
                yield shlex.split(command[1], comments=True)


@pytest.mark.parametrize("page", [page for page in pages_with("bash") if [*commands(page.values[0])]])
def test_the_commands_exist(page, monkeypatch):
    """Scripts, their options, and the configs that they are given."""
    monkeypatch.chdir(ROOT)
    for script, *arguments in commands(page):
        given = [re.sub(r"=.*", "", part) for part in arguments if part.startswith("--")]
        for config in re.findall(r"python/configs/\S+", " ".join(arguments)):
            assert Path(config).is_file(), config
        # Options are the model's; which model a run has that is not there to be asked is not known.
        known = "--init" not in arguments or {"--config", "--model"} & {*arguments}
        others = [] if known else [["--model", model] for model in ("llama", "bert", "resnet18", "detector")]
        texts = (help_of(script, [*arguments, *other], monkeypatch) for other in [[], *others])
        assert any(all(re.search(rf"{option}\b", text) for option in given) for text in texts), (
            f"{script} must have the options {', '.join(given)}"
        )


def help_of(script, arguments, monkeypatch):
    """What --help prints behind these arguments, of which command, config, model and task choose options."""
    words = [part for part in arguments[:1] if not part.startswith("-")]
    for option in ("--config", "--model", "--task"):
        if option in arguments:
            words += [option, arguments[arguments.index(option) + 1]]
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert not end.value.code, f"{script} {' '.join(words)} --help"
    return printed.getvalue()


def test_tables_are_fresh(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "readme", "--check"])
    assert report.main() == 0, capsys.readouterr().out


def test_every_op_has_its_page():
    assert sorted(path.stem for path in (ROOT / "docs/ops").glob("*.md")) == sorted([*OPS, "index"])
    for op in OPS:
        text = (ROOT / f"docs/ops/{op}.md").read_text()
        assert f"<!-- backends:begin {op} -->" in text and f"<!-- results:begin {op}" in text, op


def test_every_public_name_is_on_a_page():
    text = "\n".join(page.read_text() for page in PAGES)
    shown = re.findall(r"^::: ([\w.]+)$", text, re.M)
    for name in shown:
        docstrings.shown(name, ROOT)
    public = {
        name for name in lspm_kernels.__all__ if not isinstance(getattr(lspm_kernels, name), ModuleType)
    }
    public -= {"FallbackWarning", "use_backend"}  # which ops/index.md tells of
    assert public <= {name.rpartition(".")[2] for name in shown}


@pytest.mark.parametrize(("name", "op", "backends", "dtypes"), LISTED)
def test_the_table_of_ops(name, op, backends, dtypes):
    module = importlib.import_module(f"lspm_kernels.ops.{op}")
    assert callable(getattr(module, name))
    of_first = module.BACKENDS[0].dtypes
    assert all(set(row.dtypes) <= set(of_first) for row in module.BACKENDS)
    assert backends == ", ".join(row.name for row in module.BACKENDS)
    assert dtypes == ", ".join(str(dtype).removeprefix("torch.") for dtype in of_first)


def test_the_table_of_ops_has_all():
    assert {op for _, op, _, _ in LISTED} == set(OPS)


def test_the_names_to_import():
    rows = re.findall(r"^\| `(lspm_kernels[\w.]+)` \| (.*) \|$", (ROOT / "docs/drop-in.md").read_text(), re.M)
    modules = re.findall(r"^\| (`.*?) \| .*? \| .* \|$", (ROOT / "docs/nn.md").read_text(), re.M)
    assert len(rows) >= 3 and sorted(re.findall(r"`(\w+)`", " ".join(modules))) == sorted(
        lspm_kernels.nn.__all__
    )
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        target, _, anchor = link.partition("#")
        found = page.parent / target if target else page
        assert found.is_file(), link
        assert not anchor or anchor in anchors(found), link


def test_the_site_has_every_page():
    site = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"([\w/-]+\.md)$", site.partition("\nnav:")[2], re.M)
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[4:])
    pages = "\n".join(page.read_text() for page in PAGES)
    for path in re.findall(r'^--8<-- "(.*)"$', pages, re.M):
        assert (ROOT / path).is_file(), path


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "ops/layer_norm/index.html").read_text()
    assert "<svg" in page and "<details>" in page and "Statistics are taken in float32" in page
