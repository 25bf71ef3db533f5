"""The scripts with a BERT: train, go on exactly, fill masks, say what is like what, refuse."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import finetune
import generate
import predict
import pretrain
import pytest
import torch
from test_pretrain import kill_and_resume
from tiny_bert import BERT, make_bert

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.encoder_outputs import mask_probabilities, sentence_features
from lspm_models.hugging_face import save_pretrained
from lspm_models.run_log import read_log
from lspm_models.sources import open_source

SCRIPTS = Path(pretrain.__file__).parent
SMALL = (
    "--model bert --context 18 --layers 1 --heads 2 --width 16 --dropout 0.1 --tokenizer character"
    " --batch-size 4 --device cpu"
).split()
SHORT = "--steps 6 --evaluate-every 3 --checkpoint-every 2 --evaluation-batches 2".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.fixture(scope="module")
def trained(text):
    """A run's folder and what it said."""
    folder = text.parent / "run"
    command = [sys.executable, SCRIPTS / "pretrain.py", "--corpus", text, *SMALL, *SHORT, "--out", folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return folder, done.stdout


def losses(folder):
    return [
        [row[name] for name in ("step", "train_loss", "validation_loss", "accuracy")]
        for row in read_log(folder / "log.csv")
    ]


def refused(result, message):
    """Whether a script ended with this one line."""
    assert result[0] == 2
    assert re.fullmatch(message + "\n", result[2]), result[2]


def test_a_run_says_what_it_does(trained):
    folder, out = trained
    for pattern in (
        r"tokenizer  with masks, 33 tokens",
        r"model      4\.5k parameters: 1 layer, 16 wide, 2 heads, 18 tokens of context",
        r"step      3   training \d\.\d{4}   validation \d\.\d{4}   accuracy 0\.\d{4}   learning rate .*",
        r"guess      the most frequent token has an accuracy of 0\.\d{4}",
        r"try it     python python/predict\.py .*run --text 'return \[MASK\]'",
    ):
        assert re.search(pattern, out), pattern
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["model"]["model"], settings["data"]["masked"]) == ("bert", 0.15)
    assert len(losses(folder)) == 7


@pytest.mark.long
def test_killed_and_resumed_it_has_the_same_losses(trained, text, tmp_path):
    kill_and_resume(tmp_path / "killed", "--corpus", text, *SMALL, *SHORT)
    assert losses(tmp_path / "killed") == losses(trained[0])


def test_goes_on_from_a_run_and_from_a_folder_with_a_head(run, trained, text, tmp_path):
    folder, _ = trained
    (tmp_path / "cat.txt").write_text("the lazy cat sleeps. " * 100)
    source = open_source(folder)
    save_pretrained(source.task(), tmp_path / "hf", source.tokenizer())
    for init in (folder, tmp_path / "hf"):
        out = tmp_path / f"from-{init.name}"
        arguments = (
            "--init",
            init,
            "--corpus",
            tmp_path / "cat.txt",
            "--whole-words",
            *SHORT,
            "--batch-size",
            4,
        )
        code, said, err = run(finetune, *arguments, "--device", "cpu", "--out", out)
        assert (code, err) == (0, "")
        assert "18 tokens of context" in said
        begun, tuned = open_source(init).task(), open_source(out).task()
        moved = [(a - b).abs().max() for a, b in zip(begun.parameters(), tuned.parameters(), strict=True)]
        assert 0 < max(moved) < 2e-3
        assert open_source(out).tokenizer().encode("the fox") == source.tokenizer().encode("the fox")
    assert run(finetune, "--resume", out, "--steps", 8)[0] == 0
    message = rf"finetune\.py: checkpoint: data\.whole_words must be True as in {out}, got False"
    refused(run(finetune, "--resume", out, "--no-whole-words"), message)


def test_adapters_are_beside_its_attention(run, trained, text, tmp_path):
    arguments = ("--lora-rank", 2, "--learning-rate", 0.1, *SHORT, "--batch-size", 4, "--device", "cpu")
    code, _, err = run(
        finetune, "--init", trained[0], "--corpus", text, *arguments, "--out", tmp_path / "tuned"
    )
    assert (code, err) == (0, "")
    before, after = (
        dict(open_source(path).task().named_parameters()) for path in (trained[0], tmp_path / "tuned")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layer = "model.encoder.layer.0.attention"
    parts = "self.query", "self.key", "self.value", "output.dense"
    assert changed == {f"{layer}.{part}.weight" for part in parts}


def test_says_what_may_stand_in_a_gap(run, trained):
    folder, _ = trained
    source = open_source(folder)
    text = "th[MASK] l[MASK]zy"
    probabilities = mask_probabilities(source.task(), source.tokenizer(), text)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))
    tokenizer = source.tokenizer()
    assert not probabilities[:, torch.from_numpy(tokenizer.special)].any()
    logits = source.task()(torch.tensor([tokenizer.encode_masked(text)]))[0]
    assert torch.equal(logits[[3, 6]].argmax(-1), probabilities.argmax(-1))
    code, out, err = run(predict, folder, "--text", text, "dog", "--top", 2)
    found = r"(\S|' ') \d+\.\d%  (\S|' ') \d+\.\d%"
    wanted = rf"th\[MASK\] l\[MASK\]zy   1 of 2:  {found}\nth\[MASK\] l\[MASK\]zy   2 of 2:  {found}\n"
    assert re.fullmatch(wanted, out), out
    assert (code, err) == (2, "predict.py: predict: text must hold [MASK], got 'dog'\n")
    best = tokenizer.decode([int(probabilities[0].argmax())])
    assert out.split("1 of 2:  ")[1].startswith((best, repr(best)))


def test_says_what_is_like_what(run, tmp_path, characters):
    tokenizer = MaskTokenizer.of(characters)
    task = make_bert(replace(BERT, vocabulary_size=tokenizer.vocabulary_size)).eval()
    save_pretrained(task.model, tmp_path / "hf", tokenizer)
    sentences = ("a text", "another text", "def")
    code, out, err = run(predict, tmp_path / "hf", "--similarity", "--text", *sentences)
    assert (code, err) == (0, "")
    rows = out.splitlines()
    assert rows[0].split() == ["1", "2", "3"]
    features = sentence_features(task.model, tokenizer, sentences)
    for i, row in enumerate(rows[1:]):
        values, sentence = row.split(f"   {i + 1} ")
        assert [float(value) for value in values.split()] == pytest.approx(features @ features[i], abs=6e-4)
        assert sentence == sentences[i]
    alone = [sentence_features(task.model, tokenizer, [sentence]) for sentence in sentences]
    torch.testing.assert_close(torch.cat(alone), features)


def test_a_mistake_is_one_line(run, trained, text, tmp_path, characters):
    folder, _ = trained
    assert run(pretrain, "--model", "bert", "--context", 2, "--corpus", text, "--out", tmp_path / "a")[0] == 2
    for arguments, message in (
        ("--heads 3", r"pretrain\.py: BertConfig: width must be a multiple of heads \(3\), got 16"),
        ("--masked 1", r"pretrain\.py: data: masked must be greater than 0 and less than 1, got 1\.0"),
        ("--context 2", r"pretrain\.py: model: context must be at least 3, a token between two marks, got 2"),
        ("--key-value-heads 2", r"pretrain\.py: unknown option --key-value-heads; .*"),
    ):
        command = ("--corpus", text, *SMALL, *arguments.split(), "--out", tmp_path / "a")
        refused(run(pretrain, *command), message)
        assert not (tmp_path / "a").exists()
    message = (
        rf"generate\.py: generate: model must continue texts, got a BERT in {folder}; see predict\.py --text"
    )
    refused(run(generate, folder, "--prompt", "a"), message)
    message = r"predict\.py: predict: text must be at most 18 tokens with its marks, got 24"
    refused(run(predict, folder, "--text", "[MASK]" + "a" * 21), message)
    refused(run(predict, folder), r"predict\.py: give image files, or texts behind --text")
    refused(
        run(predict, folder, "--similarity"), r"predict\.py: output: similarity must be beside text, got none"
    )
    message = r"predict\.py: output: question must have a model that answers, got 'why'"
    refused(run(predict, folder, "--text", "[MASK]", "--question", "why"), message)
    message = rf"predict\.py: predict: model must see images, or have --text, got that of bert in {folder}"
    refused(run(predict, folder, "a.png"), message)
    message = r"predict\.py: give image files, or texts behind --text, not both"
    refused(run(predict, folder, "a.png", "--text", "[MASK]"), message)
    task = make_bert(replace(BERT, vocabulary_size=characters.vocabulary_size + 3))
    save_pretrained(task.model, tmp_path / "bare", MaskTokenizer.of(characters))
    missing = r"pretrained: .*bare must hold cls\.predictions\.bias, .* and 2 more, got none of them"
    refused(run(predict, tmp_path / "bare", "--text", "[MASK]"), rf"predict\.py: {missing}")
    refused(
        run(finetune, "--init", tmp_path / "bare", "--corpus", text, "--out", tmp_path / "b"),
        rf"finetune\.py: {missing}",
    )
    refused(
        run(predict, tmp_path / "none", "--text", "[MASK]"), r"predict\.py: checkpoint: .* got no such folder"
    )


def test_text_needs_a_bert(run, tmp_path):
    from tiny_gpt import make_task

    save_pretrained(make_task(), tmp_path / "gpt")
    refused(
        run(predict, tmp_path / "gpt", "--text", "[MASK]"),
        r"predict\.py: predict: text must have a BERT, got a gpt in .*gpt; see generate\.py --prompt",
    )


def test_the_help_tells_of_masks(run):
    for script, arguments in ((pretrain, ["--model", "bert"]), (predict, [])):
        code, out, _ = run(script, *arguments, "--help")
        assert code == 0
        assert all(len(line) <= 110 for line in out.splitlines())
        assert ("--whole-words" if script is pretrain else "--similarity") in out
