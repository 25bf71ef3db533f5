"""Files of a run that someone has changed by hand: one error names the file and the rule."""

import json
import re

import pretrain
import pytest
from tiny_task import configuration, counting, table

from lspm_models.train import fit

STEPS = 6


@pytest.fixture
def run(tmp_path):
    fit(table(), counting(), configuration(steps=STEPS), tmp_path)
    return tmp_path


def refusal(run):
    """What is said where the run is to go on."""
    with pytest.raises(ValueError) as error:
        fit(table(), counting(), configuration(steps=STEPS), run, resume=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("step", None, "must have a whole number from 0 on as step, got None"),
        ("step", "6", "must have a whole number from 0 on as step, got '6'"),
        ("step", -1, "must have a whole number from 0 on as step, got -1"),
        ("tokens", 1.5, "must have a whole number from 0 on as tokens, got 1.5"),
        ("tokens", True, "must have a whole number from 0 on as tokens, got True"),
        ("seconds", "1", "must have a number as seconds, got '1'"),
        ("train_loss", [], "must have a number as train_loss, got []"),
        ("validation_loss", None, "must have a number as validation_loss, got None"),
        ("recent", [1], "must have two numbers as recent, got [1]"),
        ("settings", [], "must have an object as settings, got []"),
        ("data", {}, "must be as it was written, got state must be for a PCG64 RNG"),
        ("random", [], "must be as it was written, got list index out of range"),
        ("random", [{}], "must be as it was written, got no 'python_gauss'"),
        ("optimizer", [], "must be as it was written, got 'list' object has no attribute 'get'"),
    ],
)
def test_a_state_that_was_changed(run, name, value, rule):
    file = run / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    assert refusal(run) == f"checkpoint: {file} {rule}"


@pytest.mark.parametrize("name", ["settings", "data", "random", "optimizer"])
def test_a_state_that_lacks_something(run, name):
    file = run / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    state = json.loads(file.read_text())
    del state[name]
    file.write_text(json.dumps(state))
    assert refusal(run) == f"checkpoint: {file} must be as it was written, got no '{name}'"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda text: text.replace("\n2,", "\ntwo,"), "a whole number as step, got 'two'"),
        (lambda text: text.replace("\n2,", "\n2,low"), "a number or nothing as train_loss, got 'low.*'"),
        (lambda text: "a,b\n1,2\n", "step in each row, got '1,2'"),
        (lambda text: text + "2\n", "train_loss in each row, got '2'"),
        (lambda text: text.replace("gradient_norm", "norm"), "gradient_norm in each row, got .*"),
    ],
)
def test_a_log_that_was_changed(run, change, rule):
    file = run / "log.csv"
    file.write_text(change(file.read_text()))
    assert re.fullmatch(f"log: {file} must have {rule}", refusal(run))


def test_a_log_that_is_no_text(run):
    (run / "log.csv").write_bytes(b"\xff\xfe\n")
    assert refusal(run).startswith(f"log: {run / 'log.csv'} must be a CSV file in UTF-8, got ")


def test_a_log_that_is_gone_or_was_cut_begins_anew(run):
    file = run / "log.csv"
    whole = file.read_text()
    for content in (whole + "7,1.2", None):
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        fit(table(), counting(), configuration(steps=STEPS), run, resume=True)
        assert file.read_text() == (whole if content else whole.splitlines()[0] + "\n")


def test_the_script_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("some text, and more of it. " * 40)
    command = ["pretrain.py", "--corpus", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    sizes = "--tokenizer character --split tail --context 8 --layers 1 --heads 1 --width 8 --batch-size 2"
    monkeypatch.setattr("sys.argv", [*command, *sizes.split(), "--steps", "2", "--validation", "0.2"])
    assert pretrain.main() == 0
    file = tmp_path / "run" / "log.csv"
    file.write_text(file.read_text().replace("\n2,", "\nx,"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--resume", str(tmp_path / "run"), "--steps", "3"])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"pretrain.py: log: {file} must have a whole number as step, got 'x'\n"
