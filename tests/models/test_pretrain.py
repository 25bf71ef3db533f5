"""pretrain.py and finetune.py as a person uses them: what they print, write, refuse, and how they go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import finetune
import pretrain
import pytest
import torch

from lspm_models.checkpoint import checkpoints
from lspm_models.run_log import read_log
from lspm_models.sources import load_language_model

SCRIPTS = Path(pretrain.__file__).parent
TEXT = "the quick brown fox jumps over the lazy dog. " * 100
SMALL = (
    "--context 16 --layers 1 --heads 2 --width 16 --tokenizer character --batch-size 4 --device cpu".split()
)
SHORT = "--steps 6 --evaluate-every 3 --checkpoint-every 2 --evaluation-batches 2".split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def trained(run, text, tmp_path):
    code, out, err = run(pretrain, "--corpus", text, *SMALL, *SHORT, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    return tmp_path / "run", out


def losses(folder):
    names = ("step", "train_loss", "validation_loss", "learning_rate", "gradient_norm")
    return [[row[name] for name in names] for row in read_log(folder / "log.csv")]


def test_a_run_says_what_it_does_and_where_everything_is(trained):
    folder, out = trained
    for pattern in (
        r"corpus     .*fox\.txt: 1 document, 0\.0 MB",
        r"tokenizer  characters, 30 tokens",
        r"encoded    4,501 tokens, 1\.00 bytes each",
        r"model      4\.05k parameters: 1 layer, 16 wide, 2 heads, 16 tokens of context",
        r"step      3   training \d\.\d{4}   validation \d\.\d{4}   learning rate .*   .* tokens/s",
        r"trained    6 steps",
        r"loss       training \d\.\d{4}, validation \d\.\d{4}",
        r"try it     python python/generate\.py ",
    ):
        assert re.search(pattern, out), pattern
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokens",
        "checkpoints",
        "log.csv",
        "loss.png",
        "tensorboard",
    }
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert json.loads((folder / "config.json").read_text())["model"]["width"] == 16
    assert len(losses(folder)) == 7


def test_the_folder_gives_the_model_back(trained):
    folder, _ = trained
    task, tokenizer = load_language_model(folder)
    assert tokenizer.decode(tokenizer.encode("lazy fox")) == "lazy fox"
    assert not task.training
    tokens = torch.tensor([tokenizer.encode("the quick brown")])
    older = load_language_model(checkpoints(folder / "checkpoints")[0])[0]
    with torch.no_grad():
        assert task(tokens).shape == (1, 15, 30)
        assert not torch.equal(task(tokens), older(tokens))


def test_fine_tuning_begins_where_pretraining_ended(run, trained, tmp_path):
    folder, _ = trained
    (tmp_path / "cat.txt").write_text("the lazy cat sleeps. " * 100)
    arguments = ("--init", folder, "--corpus", tmp_path / "cat.txt", *SHORT, "--batch-size", 4)
    code, _, err = run(finetune, *arguments, "--device", "cpu", "--out", tmp_path / "cat")
    assert (code, err) == (0, "")
    settings = json.loads((tmp_path / "cat" / "config.json").read_text())
    assert settings["init"].endswith("step-00000006")
    assert (settings["model"]["width"], settings["training"]["learning_rate"]) == (16, 1e-4)
    assert (tmp_path / "cat" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    code, _, err = run(
        finetune, "--init", folder, "--corpus", tmp_path / "fox.txt", *SHORT, "--out", tmp_path / "fox"
    )
    assert float(losses(tmp_path / "fox")[0][2]) == pytest.approx(float(losses(folder)[-1][2]), abs=0.2)
    message = rf"pretrain\.py: run: {tmp_path}/cat must not be a run of finetune\.py, got init '.*-00000006'"
    refused(run(pretrain, "--resume", tmp_path / "cat"), message)
    assert run(finetune, "--resume", tmp_path / "cat", "--steps", 8)[0] == 0
    assert len(losses(tmp_path / "cat")) == 9


def kill_and_resume(folder, *arguments):
    """A run that is killed after a few steps, and then goes on."""
    command = [sys.executable, SCRIPTS / "pretrain.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = [*command, *arguments, "--out", folder]
    process = subprocess.Popen(begun, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(read_log(folder / "log.csv")) < 4:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--resume", folder], env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.long
def test_killed_and_resumed_it_has_the_same_losses(trained, text, tmp_path):
    kill_and_resume(tmp_path / "killed", "--corpus", text, *SMALL, *SHORT)
    assert losses(tmp_path / "killed") == losses(trained[0])


def test_control_c_saves_and_says_how_to_go_on(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lspm_models.train.learning_rate", lambda done, config: os.kill(os.getpid(), 2) or 1e-3
    )
    code, out, _ = run(pretrain, "--corpus", text, *SMALL, *SHORT, "--out", tmp_path / "a run")
    assert code == 130
    assert "interrupted at step 1, which is saved; go on with" in out
    assert f"python python/pretrain.py --resume '{tmp_path / 'a run'}'" in out
    assert [path.name for path in checkpoints(tmp_path / "a run" / "checkpoints")] == ["step-00000001"]


def refused(result, message, code=2):
    """Whether a script ended with this one line."""
    assert result[0] == code
    assert re.fullmatch(message + "\n", result[2]), result[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--widht 3", r"pretrain\.py: unknown option --widht; did you mean --width\?"),
        ("--zzz", r"pretrain\.py: unknown option --zzz; see --help"),
        ("--data a.csv", r"pretrain\.py: unknown option --data; see --help"),
        ("--layers two", r"pretrain\.py: --layers: must be a whole number, got 'two'"),
        ("--learning-rate fast", r"pretrain\.py: --learning-rate: must be a number, got 'fast'"),
        ("--tokenizer words", r"pretrain\.py: --tokenizer: invalid choice: 'words' \(choose from .*"),
        ("--steps", r"pretrain\.py: --steps: expected one argument"),
        ("--steps 0", r"pretrain\.py: training: steps must be greater than 0, got 0"),
        ("--width 30 --heads 4", r"pretrain\.py: GPTConfig: width must be a multiple of heads \(4\), got 30"),
        ("--layers -1", r"pretrain\.py: GPTConfig: layers must be a positive integer, got -1"),
        ("--vocabulary-size 9", r"pretrain\.py: tokenizer: vocabulary_size must be at least 257 .*, got 9"),
        (
            "--corpus missing.txt",
            r"pretrain\.py: corpus: 'missing\.txt' must be a file, .*, got no such path",
        ),
        ("--config missing.toml", r"pretrain\.py: config: missing\.toml must be .*, got no such file"),
        ("--config .", r"pretrain\.py: config: \. must be a TOML or JSON file, got a folder"),
        ("--out fox.txt", r"pretrain\.py: run: fox\.txt must be a new or an empty folder, got a file"),
        ("--resume missing", r"pretrain\.py: run: missing must be a run folder, got no config\.json in it"),
        ("--resume missing --size 8", r"pretrain\.py: run: missing must be a run folder, got .*"),
        (
            "--config missing.toml --size 8",
            r"pretrain\.py: config: missing\.toml must be .*, got no such file",
        ),
        ("--resume . --out b", r"pretrain\.py: run: --out must be absent with --resume, got b"),
        ("--device cuda:x", r"pretrain\.py: fit: device must be one like cpu, .*, got 'cuda:x'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, text, arguments, message):
    corpus = [] if "--corpus" in arguments else ["--corpus", text]
    out = [] if "--resume" in arguments or "--out" in arguments else ["--out", "run"]
    with chdir(text.parent):
        refused(run(pretrain, *out, *corpus, *arguments.split()), message)
    assert [path.name for path in text.parent.iterdir()] == ["fox.txt"]


def test_a_mistake_leaves_an_empty_folder_as_it_was(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with chdir(tmp_path / "disk"):
        for folder in (tmp_path / "link", "."):
            code, _, err = run(pretrain, "--corpus", "nowhere", "--out", folder)
            assert code == 2 and err.startswith("pretrain.py: corpus: 'nowhere' must be a file")
    assert (tmp_path / "link").is_symlink() and not list((tmp_path / "link").iterdir())


def test_a_corpus_that_is_empty_or_too_short(run, tmp_path):
    (tmp_path / "empty.txt").touch()
    result = run(pretrain, "--corpus", tmp_path / "empty.txt", "--out", tmp_path / "run")
    refused(result, r"pretrain\.py: corpus: .*empty\.txt must hold text, got 0 bytes")
    (tmp_path / "short.txt").write_text("x" * 32)
    result = run(pretrain, "--corpus", tmp_path / "short.txt", *SMALL, "--out", tmp_path / "run")
    message = r"must hold at least 34 tokens \(one training and one validation block of 16\), got 33"
    refused(result, rf"pretrain\.py: corpus: text {message}")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_shape_is_refused(run, trained, text, tmp_path):
    folder, _ = trained
    message = rf"pretrain\.py: checkpoint: model\.width must be 16 as in {folder}, got 32"
    refused(run(pretrain, "--resume", folder, "--width", 32), message)
    (tmp_path / "other.toml").write_text("[model]\nlayers = 2\n")
    arguments = (
        "--init",
        folder,
        "--corpus",
        text,
        "--config",
        tmp_path / "other.toml",
        "--out",
        tmp_path / "o",
    )
    message = r"finetune\.py: checkpoint: model\.layers must be 1 as in .*step-00000006, got 2"
    refused(run(finetune, *arguments), message)
    refused(run(finetune, "--init", tmp_path), r"finetune\.py: checkpoint: .* got no checkpoint in it")
    refused(run(finetune, "--init", tmp_path / "x"), r"finetune\.py: checkpoint: .* got no such folder")
    refused(run(finetune), r"finetune\.py: give either --init FOLDER to begin or --resume FOLDER to continue")
    refused(
        run(pretrain, "--out", folder),
        rf"pretrain\.py: run: {folder} must be a new or an empty folder, got one that is not empty; "
        rf"continue that run with --resume {folder}",
    )


def test_a_run_is_not_resumed_with_another_text_or_a_broken_checkpoint(run, trained, text):
    folder, _ = trained
    path = checkpoints(folder / "checkpoints")[-1]
    text.write_text(TEXT + "!")
    message = rf"checkpoint: data_fingerprint must be '\w+' as in {path}, got '\w+'"
    refused(run(pretrain, "--resume", folder), rf"pretrain\.py: {message}")
    text.write_text(TEXT)
    (path / "model.safetensors").write_bytes(b"short")
    message = r"checkpoint: .*model\.safetensors must be a whole safetensors file, got .*"
    refused(run(pretrain, "--resume", folder), rf"pretrain\.py: {message}")
    message = rf"run: {folder} must be a run of finetune\.py, got init None"
    refused(run(finetune, "--resume", folder), rf"finetune\.py: {message}")
    (folder / "config.json").write_text("[]")
    message = rf"json: {folder}/config\.json must be an object, got list"
    refused(run(pretrain, "--resume", folder), rf"pretrain\.py: {message}")


def test_a_loss_that_is_not_finite_ends_with_one_line(run, text, tmp_path):
    arguments = ("--learning-rate", "1e30", "--clip", "0", "--warmup", "0", "--out", tmp_path / "run")
    message = r"pretrain\.py: fit: .* must be finite, got (nan|inf) at step \d; there is no checkpoint yet"
    result = run(pretrain, "--corpus", text, *SMALL, "--steps", 6, *arguments)
    refused(result, message, code=1)


def test_one_step_is_no_steps(run, text, tmp_path):
    _, out, _ = run(pretrain, "--corpus", text, *SMALL, "--steps", 1, "--out", tmp_path / "a run")
    assert "trained    1 step; this session took" in out
    assert f"try it     python python/generate.py '{tmp_path / 'a run'}'" in out


def test_a_missing_package_is_one_line(run, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = run(pretrain, "--corpus", text, "--out", tmp_path / "run")
    refused(
        result,
        r"pretrain\.py: needs the package tokenizers; "
        r"install it, in the repository, with: pip install '\.\[models\]'",
    )


def test_flags_override_the_file_and_the_file_the_defaults(run, text, tmp_path):
    (tmp_path / "c.toml").write_text('[training]\nsteps = 3\nseed = 5\n[data]\ntokenizer = "character"\n')
    arguments = ("--config", tmp_path / "c.toml", "--corpus", text, *SMALL, "--steps", 2, "--no-bias")
    assert run(pretrain, *arguments, "--out", tmp_path / "run")[0] == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["training"]["steps"], settings["training"]["seed"], settings["model"]["bias"]) == (
        2,
        5,
        False,
    )
    again = ("--config", tmp_path / "run" / "config.json", "--out", tmp_path / "again")
    assert run(pretrain, *again)[0] == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_the_help_is_a_page_with_defaults_and_examples(run):
    for script in (pretrain, finetune):
        code, out, _ = run(script, "--help")
        assert code == 0
        assert all(len(line) <= 110 for line in out.splitlines())
        for part in (
            "\nrun:\n",
            "\ntext:\n",
            "\ntraining:\n",
            "\nexamples\n",
            "[stdlib]",
        ):
            assert part in out
    assert "learning rate after warm-up [0.0001]" in out
    assert "--width" not in out
