"""Classification of whole texts: pooling, padding, the data, and finetune.py and predict.py with them."""

import re
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import finetune
import generate
import numpy as np
import predict
import pretrain
import pytest
import torch
import torch.nn.functional as F
from test_pretrain import refused
from tiny_bert import BERT
from tiny_gpt import CONFIG, LLAMA
from tiny_reviews import complaints, reviews, write

from lspm_models.checkpoint import checkpoints
from lspm_models.data.sequences import SequenceData, Sequences, padded
from lspm_models.fit_config import FitConfig
from lspm_models.hugging_face import save_pretrained
from lspm_models.language_models import MODELS
from lspm_models.models.gpt import GPT
from lspm_models.options import merge, read_config
from lspm_models.run_log import read_log
from lspm_models.sequence_job import ClassificationJob
from lspm_models.sequence_models import load_sequence_model
from lspm_models.sources import open_source
from lspm_models.tasks.language_modelling import LanguageModelling
from lspm_models.tasks.sequence_classification import SequenceClassification, encode
from lspm_models.text_job import TextJob
from lspm_models.train import fit

MEAN = replace(BERT, pooler=False)
SMALL = "--context 24 --layers 1 --heads 2 --width 16 --batch-size 4 --device cpu --steps 2".split()
SHORT = (
    "--steps 6 --evaluate-every 3 --checkpoint-every 2 --evaluation-batches 2 --batch-size 8 --device cpu "
    "--dropout 0.1 --validation 0.25"
).split()


def make_task(config=CONFIG, **options):
    """A classifier with weights so large that each part of it shows in the logits."""
    torch.manual_seed(0)
    task = SequenceClassification(MODELS[type(config)](config), 3, **options)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return task.eval()


def rows(*lengths):
    return [np.random.default_rng(length).integers(1, 60, length) for length in lengths]


@pytest.mark.parametrize(
    ("config", "pooling"),
    [(CONFIG, "last"), (CONFIG, "mean"), (LLAMA, "last"), (LLAMA, "mean"), (BERT, "first"), (MEAN, "mean")],
    ids=["gpt-last", "gpt-mean", "llama-last", "llama-mean", "bert-first", "bert-mean"],
)
def test_padding_changes_nothing(config, pooling):
    task, texts = make_task(config, pooling=pooling), rows(5, 24, 1, 9)
    together, targets = padded(texts), torch.tensor([0, 2, 1, 1])
    assert (together[2] == -1).sum() == 23
    alone = torch.cat([task(padded([row])) for row in texts])
    torch.testing.assert_close(task(together), alone)
    gradients = []
    for logits in (task(together), alone):
        F.cross_entropy(logits, targets).backward()
        gradients.append([parameter.grad.clone() for parameter in task.parameters()])
        task.zero_grad()
    torch.testing.assert_close(*gradients)


def test_what_is_pooled():
    features, lengths = torch.randn(2, 4, CONFIG.width), torch.tensor([4, 2])
    last, mean = (make_task(pooling=name).pooled(features, lengths) for name in ("last", "mean"))
    assert torch.equal(last, torch.stack([features[0, 3], features[1, 1]]))
    torch.testing.assert_close(mean, torch.stack([features[0].mean(0), features[1, :2].mean(0)]))
    with pytest.raises(ValueError, match=r"pooling of a GPT, .*, must be last or mean, got 'first'$"):
        make_task(pooling="first")
    with pytest.raises(ValueError, match=r"pooling must be one of last, mean, first, got 'max'$"):
        make_task(pooling="max")
    with pytest.raises(ValueError, match=r"classes must be at least 2, got 1$"):
        SequenceClassification(GPT(CONFIG), 1)


def test_the_loss_and_what_is_measured():
    task, tokens, targets = make_task(label_smoothing=0.2), padded(rows(5, 9, 3)), torch.tensor([0, 2, 1])
    logits = task(tokens)
    torch.testing.assert_close(
        task.loss(tokens, targets), F.cross_entropy(logits, targets, label_smoothing=0.2)
    )
    loss, counts = task.evaluate(tokens, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    assert counts.view(3, 3).sum(1).tolist() == [1, 1, 1]
    assert counts.view(3, 3).sum(0).tolist() == logits.argmax(1).bincount(minlength=3).tolist()
    # precision 2/3 and 1, recall 1 and 1/2; the third class is nowhere
    measured = task.metrics([2.0, 0, 0, 1, 1, 0, 0, 0, 0])
    assert measured == pytest.approx({"accuracy": 3 / 4, "f1": (4 / 5 + 2 / 3) / 2})


def test_next_tokens_are_learned_beside_labels():
    texts, targets = rows(5, 9, 3), torch.tensor([0, 2, 1])
    task, both = make_task(), make_task(language_modelling=0.5)
    logits = LanguageModelling(task.model).head(encode(task.model, padded(texts))[0])
    pairs = [(logits[i, : len(row) - 1], torch.from_numpy(row[1:])) for i, row in enumerate(texts)]
    of_tokens = F.cross_entropy(*(torch.cat(part) for part in zip(*pairs, strict=True)))
    expected = task.loss(padded(texts), targets) + 0.5 * of_tokens
    torch.testing.assert_close(both.loss(padded(texts), targets), expected)
    assert torch.equal(both.evaluate(padded(texts), targets)[0], task.evaluate(padded(texts), targets)[0])
    for config, name in ((LLAMA, "Llama"), (MEAN, "Bert")):
        with pytest.raises(ValueError, match=rf"language_modelling must be 0 .*, got 0\.5 of a {name}$"):
            make_task(config, pooling="mean", language_modelling=0.5)


def test_it_learns_what_tells_the_label(tmp_path, characters):
    def sequences(lines):
        ids = [np.array([characters.end_of_text, *characters.encode(text)]) for text, _ in lines]
        return Sequences(ids, np.array([label == "good" for _, label in lines], np.int64))

    config = type(CONFIG)(characters.vocabulary_size, 40, layers=2, heads=2, width=32)
    data = SequenceData(sequences(reviews(400)), sequences(reviews(60, 1)), 40, validation_batches=2)
    torch.manual_seed(0)
    task, lines = SequenceClassification(GPT(config), 2, dropout=0.1), []
    options = {"learning_rate": 1e-2, "evaluate_every": 80, "checkpoint_every": 80, "device": "cpu"}
    fit(task, data, FitConfig(steps=80, batch_size=40, **options), tmp_path, report=lines.append)
    history = read_log(tmp_path / "log.csv")
    assert float(history[1]["train_loss"]) > 0.6
    assert np.mean([float(row["train_loss"]) for row in history[-10:]]) < 0.2
    assert float(history[-1]["accuracy"]) > 0.95
    assert re.search(r"accuracy \d\.\d{4}   f1 \d\.\d{4}   learning rate .* texts/s$", lines[0])
    assert {place for places, *_ in data.all_held_out() for place in places.tolist()} == set(range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with reviews.tsv and a language model that has read them."""
    path = tmp_path_factory.mktemp("reviews")
    write(path / "reviews.tsv", reviews(80))
    (path / "reviews.txt").write_text("\n".join(text for text, _ in reviews(80)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", StringIO())
        kinds = {"gpt": ["--tokenizer", "character"], "llama": ["--vocabulary-size", "300"]}
        for name, more in (*kinds.items(), ("bert", kinds["gpt"])):
            arguments = ["--model", name, "--corpus", path / "reviews.txt", *SMALL, *more]
            arguments += ["--out", path / name]
            patch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
            assert pretrain.main() == 0
    return path


def losses(path):
    names = ("step", "train_loss", "validation_loss", "accuracy", "f1", "learning_rate", "texts")
    return [[row[name] for name in names] for row in read_log(path / "log.csv")]


def test_the_scripts_from_a_run_to_labels_of_new_texts(run, folder, tmp_path, monkeypatch):
    data, path = folder / "reviews.tsv", tmp_path / "run"
    common = ("--task", "classification", "--init", folder / "gpt", "--data", data, *SHORT)
    code, out, err = run(finetune, *common, "--out", path)
    assert (code, err) == (0, "")
    for pattern in (
        rf"texts      {data}: 60 to train on, 20 to validate on; 2 labels: (bad|good) 50%, (bad|good) 50%",
        r"head       a new one",
        r"model      .*, 24 tokens of context, 2 labels by the last token",
        r"step      3   training .*   validation .*   accuracy \d\.\d{4}   f1 \d\.\d{4}   .* texts/s",
        r"accuracy   \d+\.00% of 20 texts set aside, \d+ wrong; F1 \d\.\d{4}",
        r"label      bad: precision (-|\d+\.\d%), recall \d+\.\d% of 10\n",
        rf"mistakes   {path}/mistakes\.tsv, the surest first",
        rf'try it     python python/predict\.py {path} --text "a text"',
    ):
        assert re.search(pattern, out), pattern
    wrong = int(re.search(r"(\d+) wrong", out)[1])
    mistakes = [line.split("\t") for line in (path / "mistakes.tsv").read_text().splitlines()[1:]]
    assert len(mistakes) == wrong
    assert all(label != given and 0.5 <= float(share) <= 1 for label, given, share, _ in mistakes)
    code, out, err = run(predict, path, "--top", 1, "--text", "abc fine", " ")
    assert re.fullmatch(r"abc fine   (good|bad) \d+\.\d%\n", out)
    assert (code, err) == (1, "predict.py:  : text must not be empty, got nothing\n")
    for letters, end in (
        (22, ""),
        (23, r"   \(without its last 1 token\)"),
        (1024, r".* last 1,002 tokens\)"),
    ):
        code, out, err = run(predict, path, "--text", "a" * letters)  # 24 with what begins and ends a text
        assert re.fullmatch(rf"a{{{letters}}}   (good|bad) \d+\.\d%  (good|bad) \d+\.\d%{end}\n", out)
        assert (code, err) == (0, "")
    monkeypatch.setattr(sys, "stdin", StringIO("abc fine\ndull\n"))
    assert len(run(predict, path, "--text", "-")[1].splitlines()) == 2
    message = r"predict\.py: output: question must be absent of a classifier, got 'why'"
    refused(run(predict, path, "--text", "a", "--question", "why"), message)
    message = (
        r"generate\.py: checkpoint: .* must hold the config of a language model, got that of classification"
    )
    refused(run(generate, path), message)
    # From the last checkpoint but one, as if it had been killed behind it: the same losses once more.
    whole = losses(path)
    shutil.rmtree(checkpoints(path / "checkpoints")[-1])
    assert run(finetune, "--resume", path)[0] == 0
    assert losses(path) == whole
    code, out, _ = run(finetune, "--init", path, "--data", data, *SHORT, "--out", tmp_path / "again")
    assert (code, "head       a new one" in out) == (0, False)  # whose labels are the same
    assert float(losses(tmp_path / "again")[0][2]) == pytest.approx(float(whole[-1][2]), rel=1e-6)
    three = write(tmp_path / "three.tsv", [*reviews(40), *((f"hm {i}", "so") for i in range(8))])
    code, out, _ = run(finetune, "--init", path, "--data", three, *SHORT, "--out", tmp_path / "three")
    assert (code, "head       a new one" in out) == (0, True)
    assert load_sequence_model(tmp_path / "three")[2]["labels"] == ["bad", "good", "so"]


@pytest.mark.parametrize(
    ("name", "options", "pooling"),
    [("llama", ["--pooling", "mean"], "mean"), ("bert", [], "first"), ("hf", ["--pooling", "mean"], "mean")],
)
def test_other_models_and_poolings(run, folder, tmp_path, name, options, pooling):
    init = folder / name
    if name == "hf":
        source, init = open_source(folder / "bert"), tmp_path / "hf"
        save_pretrained(source.task(), init, source.tokenizer())
    options = [*SHORT[:-4], "--validation", "0.25", "--length", "8", *options]
    arguments = ("--task", "classification", "--init", init, "--data", folder / "reviews.tsv", *options)
    code, out, err = run(finetune, *arguments, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert re.search(r"cut        \d+ of 60 texts to 8 tokens\n", out)
    assert re.search(r"2 labels by the (mean of the tokens|first token)\n", out)
    task, tokenizer, head = load_sequence_model(tmp_path / "run")
    assert (head, task.training) == ({"labels": ["bad", "good"], "pooling": pooling}, False)
    assert tokenizer.vocabulary_size == task.config.vocabulary_size
    assert getattr(task.config, "pooler", False) == (pooling == "first")


def test_the_bundled_configs_are_valid():
    jobs = {"sentiment_pretrain": TextJob(), "sentiment": ClassificationJob(TextJob())}
    found = {}
    for name, job in jobs.items():
        content = read_config(Path(finetune.__file__).parent / "configs" / f"{name}.toml")
        merged = merge(job.sections, [content])
        found[name] = {section: job.sections[section](**options) for section, options in merged.items()}
    pretraining, classification = found.values()
    assert pretraining["data"].corpus == (f"{classification['data'].data}-training",)
    assert pretraining["data"].vocabulary_size == 4000


def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, folder, tmp_path, monkeypatch):
    shutil.copy(folder / "reviews.tsv", tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments, message in complaints(tmp_path).items():
        common = ("--task", "classification", "--init", folder / "gpt", "--out", tmp_path / "run")
        refused(run(finetune, *common, "--data", *arguments.split()), rf"finetune\.py: {message}")
        assert not (tmp_path / "run").exists()
    task = ("--task", "classification")
    message = (
        r"finetune\.py: data: data must be a \.tsv, \.csv or \.jsonl file of texts with labels, got none"
    )
    refused(run(finetune, *task, "--init", folder / "gpt"), message)
    message = r"finetune\.py: task: name must be one of classification, question_answering, got 'sorting'"
    refused(run(finetune, "--task", "sorting", "--init", folder / "gpt"), message)
    message = r"finetune\.py: task: name must be absent with resnet18, got 'classification'"
    refused(run(finetune, *task, "--model", "resnet18"), message)
    message = (
        r"pretrain\.py: task: classification must begin with trained weights: finetune\.py --init, got .*"
    )
    refused(run(pretrain, *task, "--data", "reviews.tsv"), message)


def test_the_help_is_a_page_of_its_own(run):
    code, out, _ = run(finetune, "--task", "classification", "--help")
    assert code == 0
    assert all(len(line) <= 110 for line in out.splitlines())
    for part in ("\ntexts:\n", "--held-out FILE", "--pooling", "--dropout", "\nexamples\n", "[0.0001]"):
        assert part in out
    assert "--corpus" not in out
