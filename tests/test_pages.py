"""What pages are made of: markers that are filled, docstrings as Markdown, pictures of speeds."""

import xml.etree.ElementTree as ET

import docstrings
import markers
import pytest
import speed_plot

OF = {"threads": 2, "torch": "2.13", "triton": "", "gcc": "", "commit": "c", "date": "d", "command": "again"}
BACKENDS = """| op | backend | device | dtypes | needs besides | else |
|---|---|---|---|---|---|
| mf | cpu | cpu | float32 | nothing | plain PyTorch |
| mf | cuda | cuda | float32 | nothing | plain PyTorch |
| mlp | cpu | cpu | float32 | nothing | plain PyTorch |
"""


def row(case, processor="Zen", variant="lspm-cpu", **more):
    times = {"median_us": 10.0, "low_us": 9.0, "high_us": 11.0, "extra_us": 0.0, "rate": None, "roof": None}
    of = {"benchmark": case.split("/")[0], "case": case, "variant": variant, "processor": processor}
    return of | OF | times | {"peak_bytes": None, "goals": [], "speedup": {"torch": 2.0}} | more


def filled(text, *files):
    return markers.filled(text, list(files), lambda: BACKENDS)


def test_a_headline_has_each_case_on_each_machine_in_the_order_asked():
    files = [[row("a/x"), row("b/y"), row("b/y", variant="torch")], [row("b/y", "Xeon")]]
    goal = {"what": "libmf", "bound": 2.0, "got": 1.5, "met": False}
    files.append([row("a/x", "H200", "lspm-triton", speedup={"libmf": 1.5}, goals=[goal])])
    files.append([row("a/x", "AVX2", forced="LSPM_ISA=avx2")])
    lines = filled("<!-- headline:begin\nb/* a/x\n-->\nold\n<!-- headline:end -->", *files).splitlines()
    assert lines[:3] == ["<!-- headline:begin", "b/* a/x", "-->"] and lines[-1] == "<!-- headline:end -->"
    assert lines[3] == "| case | on | kernel | us | torch, us | x torch | x compile | goals |"
    assert lines[5:-1] == [
        "| b/y | Zen | cpu | 10 (9 to 11) | 10 | 2.00 |  |  |",
        "| b/y | Xeon | cpu | 10 (9 to 11) |  |  |  |  |",
        "| a/x | Zen | cpu | 10 (9 to 11) |  |  |  |  |",
        "| a/x | H200 | triton | 10 (9 to 11) |  |  |  | x LIBMF 1.50 >= 2.00 MISS |",
    ]


def test_backends_of_one_op_of_all_and_in_short():
    begin, end = "<!-- backends:begin{} -->\n", "<!-- backends:end -->"
    assert filled(begin.format("") + "old" + end) == begin.format("") + BACKENDS + end
    of_mlp = filled(begin.format(" mlp") + end).splitlines()
    assert len(of_mlp) == 5 and of_mlp[3].startswith("| mlp | cpu |")
    short = filled("<!-- support:begin -->\n<!-- support:end -->").splitlines()
    assert short[3:-1] == [
        "| cpu | float32 | [mlp](docs/ops/mlp.md) |",
        "| cpu, cuda | float32 | [mf](docs/ops/mf.md) |",
    ]


def test_no_results_are_said_to_be_none():
    text = "<!-- results:begin drop-in -->\n<!-- results:end drop-in -->"
    assert filled(text).splitlines()[1] == "No results yet."


SOURCE = '''
def scale_(x: Tensor, by: float = 2.0, *, out: Tensor | None = None) -> Tensor:
    """x *= by, for x[i] < 1 and `x[i] > 2`:

        y = x * by

    Args:
        x: (N,), which
            changes.
        by, out: a number: any; and
            a tensor.

    Returns:
        x, of which
        more is said.

    Source: A. Author, "x * y"
    (2020).
    """


class Scale:
    """Scales."""

    def __init__(self, by: float = 2.0): ...
'''


def test_docstrings(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    assert docstrings.shown("m.scale_", tmp_path).split("\n\n") == [
        "## `scale_`",
        "```python\nscale_(x: Tensor, by: float = 2.0, *, out: Tensor | None = None) -> Tensor\n```",
        r"x \*= by, for x\[i\] &lt; 1 and `x[i] > 2`:",
        "    y = x * by",
        "**Args**",
        "- `x`: (N,), which changes.\n- `by, out`: a number: any; and a tensor.",
        "**Returns**: x, of which more is said.",
        r'**Source**: A. Author, "x \* y" (2020).',
    ]
    assert "```python\nScale(by: float = 2.0)\n```" in docstrings.shown("m.Scale", tmp_path)
    message = r"docstrings: name must be a function or a class of a module, got 'm\.none'$"
    with pytest.raises(ValueError, match=message):
        docstrings.shown("m.none", tmp_path)


def test_speed_plot():
    rows = [row("a/x", speedup={"torch": 0.5}), row("a/<x>", "H200", "lspm-cuda", speedup={"torch": 8.0})]
    rows += [row("a/z", speedup={"libmf": 2.0}), row("a/x", variant="torch"), row("a/wrong", speedup={})]
    picture = ET.fromstring(speed_plot.svg([rows]))
    dots = picture.findall("circle[title]")
    assert [dot[0].text for dot in dots] == ["Zen: 0.50", "H200, cuda: 8.00", "Zen: 2.00"]
    texts = [text.text for text in picture.findall("text")]
    assert texts[1:6] == ["0.5", "1", "2", "4", "8"]
    assert texts[6:] == ["a/x", "a/<x>", "a/z, against libmf", "Zen", "H200, cuda"]
    places = [float(dot.get("cx")) for dot in dots]
    ticks = [float(text.get("x")) for text in picture.findall("text")[1:6]]
    assert places == [ticks[0], ticks[4], ticks[2]]
    assert speed_plot.svg([[row("a/x", speedup={})]]) == ""
