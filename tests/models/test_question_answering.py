"""Answers to questions: SQuAD's files and scores, windows, the best span, and the scripts with them."""

import json
import re
import sys
from dataclasses import replace
from io import StringIO

import finetune
import numpy as np
import predict
import pretrain
import pytest
import torch
import torch.nn.functional as F
from test_pretrain import refused
from tiny_bert import BERT
from tiny_gpt import CONFIG, LLAMA
from tiny_questions import people, write

from lspm_models.data.questions import Question, answer_tokens, read_questions, set_aside, windows
from lspm_models.data.sequences import SequenceData, padded
from lspm_models.data.tokenizers import ByteBpe
from lspm_models.fit_config import FitConfig
from lspm_models.language_models import make_model
from lspm_models.models.llama import Llama
from lspm_models.run_log import read_log
from lspm_models.sequence_models import load_sequence_model
from lspm_models.sequence_outputs import answer, answers, report_answers
from lspm_models.tasks.question_answering import QuestionAnswering, best_spans
from lspm_models.train import fit

SMALL = "--context 48 --layers 1 --heads 2 --width 16 --batch-size 4 --device cpu --steps 2".split()
SHORT = "--steps 4 --evaluate-every 2 --batch-size 8 --device cpu --stride 8 --longest 6".split()


def make_task(config=CONFIG, **options):
    torch.manual_seed(0)
    task = QuestionAnswering(make_model(config), **options)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return task.eval()


@pytest.mark.parametrize("config", [CONFIG, LLAMA, replace(BERT, pooler=False)], ids=["gpt", "llama", "bert"])
def test_padding_changes_nothing(config):
    task, targets = make_task(config), torch.tensor([[3, 5, 2, 7], [0, 0, 2, 18], [1, 1, 1, 3]])
    rows = [np.random.default_rng(length).integers(1, 60, length) for length in (9, 20, 5)]
    together = task(padded(rows), targets[:, 2:])
    for place, row in enumerate(rows):
        alone = task(padded([row]), targets[place : place + 1, 2:])
        for both, one in zip(together, alone, strict=True):
            torch.testing.assert_close(both[place, : len(row)], one[0])
            assert both[place, len(row) :].isneginf().all()
    expected = torch.stack([F.cross_entropy(both, targets[:, i]) for i, both in enumerate(together)]).mean()
    loss = task.loss(padded(rows), targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


def test_the_best_span_is_that_of_a_search_over_all():
    first, last = torch.randn(2, 5, 12)
    contexts = torch.tensor([[2, 10], [5, 5], [3, 11], [1, 4], [6, 9]])
    for longest in (1, 3, 20):
        found, spans, none = best_spans(first, last, contexts, longest)
        for row, (low, high) in enumerate(contexts.tolist()):
            pairs = {
                (i, j): (first[row, i] + last[row, j]).item()
                for i in range(low, high + 1)
                for j in range(i, min(i + longest, high + 1))
            }
            assert tuple(spans[row].tolist()) == max(pairs, key=pairs.get)
            assert found[row].item() == pytest.approx(max(pairs.values()))
            assert none[row] == first[row, 0] + last[row, 0]


def test_what_is_measured_in_training():
    class Known(QuestionAnswering):
        def forward(self, tokens, contexts):
            return first, last

    targets = torch.tensor([[3, 4, 2, 6], [0, 0, 2, 6], [3, 4, 2, 6]])
    first, last = torch.zeros(3, 8), torch.zeros(3, 8)
    first[0, 3] = last[0, 4] = first[1, 0] = last[1, 0] = first[2, 3] = last[2, 5] = 9
    task = Known(make_model(CONFIG))
    _, sums = task.evaluate(torch.ones(3, 8, dtype=torch.int64), targets)
    assert (sums.tolist(), task.metrics([2.0, 3.0])) == ([2, 3], {"accuracy": 2 / 3})
    with pytest.raises(ValueError, match=r"^QuestionAnswering: longest must be at least 1, got 0$"):
        make_task(longest=0)


@pytest.fixture(scope="module")
def tokenizer():
    paragraphs = people(200)["data"][0]["paragraphs"]
    return ByteBpe.train([item["context"] for item in paragraphs], 330)


def test_windows_cover_the_text_and_answers_stand_in_them(tokenizer, tmp_path, characters):
    context = (
        "Ann lives in Zürich (\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-56FD}) and likes tea. "
        * 4
    )
    questions = [
        Question(str(start), "Where does Ann live?", context, (text,), (start,))
        for text in ("Zürich", "\N{CJK UNIFIED IDEOGRAPH-56FD}", "Ann", "tea", "lives in Z")
        for start in range(len(context))
        if context.startswith(text, start)
    ] + [Question("none", "Where?", context)]
    with pytest.raises(ValueError, match=r"^data: stride must be at least 1, got 0$"):
        windows(questions, tokenizer, length=60, stride=0)
    for kind, length in ((tokenizer, 60), (characters, 70), (characters, 300)):
        found = windows(questions, kind, length=length, stride=10)
        end = kind.end_of_text
        held, seen = set(), {index: [] for index in range(len(questions))}
        for row in range(len(found.sequences)):
            tokens, owner = found.sequences.tokens[row].tolist(), found.question[row]
            start, stop, low, high = found.sequences.targets[row].tolist()
            question = questions[owner]
            assert len(tokens) <= length
            assert tokens[0] == tokens[low - 1] == tokens[high + 1] == end
            assert tokens[1 : low - 1] == kind.encode(question.question)
            spans = found.spans[row]
            assert len(spans) == high + 1 - low
            seen[owner] += spans.tolist()
            if start:
                text = context[spans[start - low, 0] : spans[stop - low, 1]]
                assert question.answers[0] in text
                assert len(text.strip()) <= len(question.answers[0]) + 5
                held.add(owner)
        assert held == set(range(len(questions) - 1))
        for owner, spans in seen.items():
            covered = {place for low, high in spans for place in range(low, high)}
            assert covered == set(range(len(context))), owner
    apart = windows(questions[-1:], characters, length=30, stride=1000)
    assert np.concatenate(apart.spans)[:, 0].tolist() == list(range(len(context)))
    with pytest.raises(ValueError, match=r"^data: question 0 must leave room in 9 tokens, got \d+ itself$"):
        windows([replace(questions[0], name="0")], tokenizer, length=9, stride=1)


def test_the_best_of_all_windows_is_the_answer(characters):
    class Known(QuestionAnswering):
        def forward(self, tokens, contexts):
            logits = 9.0 * (tokens == characters.encode("T")[0])
            return logits, logits

    asked = [Question("a", "Who?", "x" * place + "T" + "x" * (50 - place)) for place in (0, 20, 50)]
    found = windows(asked, characters, length=20, stride=7)
    assert [text for text, _ in answers(Known(make_model(CONFIG)), asked, found, False)] == ["T"] * 3


def test_answers_are_found_by_their_characters():
    places = np.array([[0, 3], [3, 4], [4, 6], [4, 6], [6, 9]])
    cases = {(0, 3): (0, 0), (3, 4): (1, 1), (4, 6): (2, 3), (1, 5): (0, 3), (5, 8): (2, 4), (8, 9): (4, 4)}
    for (start, stop), tokens in cases.items():
        assert answer_tokens(places, start, "x" * (stop - start)) == tokens


def test_questions_of_one_text_are_not_split(tmp_path):
    questions = read_questions(write(tmp_path / "a.json", 60, impossible=True))
    assert (len(questions), sum(not item.answers for item in questions)) == (180, 60)
    assert all(
        item.context[s:].startswith(a)
        for item in questions
        for a, s in zip(item.answers, item.starts, strict=True)
    )
    training, held_out = set_aside(questions, 0.25)
    assert len(training) + len(held_out) == 180
    contexts = {item.context for item in held_out}
    assert len(contexts) == int(0.25 * len({item.context for item in questions}))
    assert not contexts & {item.context for item in training}


def test_it_learns_to_answer(tmp_path, tokenizer):
    parts = [
        read_questions(write(tmp_path / "a.json", count, seed, impossible=True))
        for count, seed in ((150, 0), (40, 1))
    ]
    rows, held_out = (windows(part, tokenizer, length=64, stride=32) for part in parts)
    data = SequenceData(rows.sequences, held_out.sequences, 32, validation_batches=4)
    shape = replace(
        LLAMA, vocabulary_size=tokenizer.vocabulary_size, context=64, layers=2, width=48, hidden=96
    )
    torch.manual_seed(0)
    task, lines = QuestionAnswering(Llama(shape), longest=8), []
    options = {"learning_rate": 5e-3, "evaluate_every": 160, "checkpoint_every": 160, "device": "cpu"}
    fit(task, data, FitConfig(steps=160, batch_size=32, **options), tmp_path / "run")
    history = read_log(tmp_path / "run" / "log.csv")
    assert float(history[1]["train_loss"]) > 2
    assert float(history[-1]["train_loss"]) < 0.5
    report_answers(task, parts[1], held_out, True, lines.append)
    names = [" of 120 questions", " of 80 questions with an answer", " of 40 questions without an answer"]
    found = [re.fullmatch(r"answers    exact match (\S+)%, F1 (\S+)%(.*)", line) for line in lines]
    assert [match[3] for match in found] == names
    assert all(float(match[1]) > 80 and float(match[2]) >= float(match[1]) for match in found)
    # Cut into windows that hold a part of the text each, most answers are the same.
    whole = answers(task, parts[1], held_out, False)
    narrow = windows(parts[1], tokenizer, length=30, stride=6)
    assert len(narrow.sequences) > len(held_out.sequences)
    cut = answers(task, parts[1], narrow, False)
    assert sum(one[0] == two[0] for one, two in zip(whole, cut, strict=True)) > 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with people.json and a language model that has read of other people."""
    path = tmp_path_factory.mktemp("questions")
    write(path / "people.json", 40, impossible=True)
    contexts = [item["context"] for item in people(60)["data"][0]["paragraphs"]]
    (path / "people.txt").write_text("\n".join(contexts))
    arguments = ["--corpus", path / "people.txt", *SMALL, "--vocabulary-size", 300, "--out", path / "gpt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", StringIO())
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        assert pretrain.main() == 0
    return path


def test_the_scripts_from_a_run_to_an_answer(run, folder, tmp_path):
    common = ("--task", "question_answering", "--init", folder / "gpt", "--data", folder / "people.json")
    code, out, err = run(finetune, *common, *SHORT, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    for pattern in (
        r"questions  .*people\.json: 108 to train on, 12 to validate on; 36 to train on have no answer",
        r"windows    \d+ and \d+, of 48 tokens at most",
        r"head       a new one",
        r"step      2   training .*   validation .*   accuracy \d\.\d{4}   .* windows/s",
        r"answers    exact match \d+\.\d\d%, F1 \d+\.\d\d% of 12 questions\n",
        r"answers    exact match \d+\.\d\d%, F1 \d+\.\d\d% of 4 questions without an answer\n",
        r'try it     python python/predict\.py .*/run --text "a text" --question "What \.\.\.\?"',
    ):
        assert re.search(pattern, out), pattern
    text, question = "Ann lives in Rome and likes tea. " * 5, "Where does Ann live?"
    code, out, err = run(predict, tmp_path / "run", "--text", text, "", "--question", question)
    found = re.fullmatch(r"(.*)   (\S.*) \d+\.\d%\n", out)
    assert found[1] == text
    assert found[2] in (*text.split("."), "(no answer)") or found[2] in text
    assert (code, err) == (1, "predict.py: : text must not be empty, got nothing\n")
    task, tokenizer, head = load_sequence_model(tmp_path / "run")
    assert head == {"longest": 6, "length": 48, "stride": 8, "none": True}
    assert answer(task, tokenizer, head, question, text)[0] == found[2].replace("(no answer)", "")
    message = r"predict\.py: output: question must be given, since the model answers questions, got none"
    refused(run(predict, tmp_path / "run", "--text", text), message)
    again = (
        "--init",
        tmp_path / "run",
        "--data",
        folder / "people.json",
        "--held-out",
        folder / "people.json",
    )
    code, out, _ = run(finetune, *again, *SHORT, "--out", tmp_path / "again")
    assert (code, "head       a new one" in out) == (0, False)
    assert "120 to train on, 120 to validate on" in out


def broken(**changes):
    """A file whose only question is changed."""
    paragraph = {"context": "Ann lives in Rome.", "qas": [{"id": "q1", "question": "Where?"}]}
    paragraph["qas"][0]["answers"] = [{"text": "Rome", "answer_start": 13}]
    for name, value in changes.items():
        (paragraph if name in paragraph else paragraph["qas"][0])[name] = value
    return {"data": [{"title": "Ann", "paragraphs": [paragraph]}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": []}, r"data: .*x\.json must hold questions, got none"),
        ({"rows": []}, r"data: data of .*x\.json must be a list of objects, got None"),
        ([], r"json: .*x\.json must be an object, got list"),
        (broken(context=""), r"data: context of Ann in .* must be a text that is not empty, got ''"),
        (broken(question=" "), r"data: question of question q1 in .* must be a text .*, got ' '"),
        (broken(answers="Rome"), r"data: answers of question q1 in .* must be a list of objects, got 'Rome'"),
        (
            broken(answers=[{"text": "Rome", "answer_start": 12}]),
            r"data: answer_start of question q1 in .* must be where 'Rome' stands, got ' Rom'",
        ),
        (broken(answers=[{"text": "Rome"}]), r"data: answer_start of question q1 .*, got None"),
        (broken(question="Where " * 40), r"data: question q1 must leave room in 48 tokens, got \d+ itself"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(run, folder, tmp_path, content, message):
    (tmp_path / "x.json").write_text(json.dumps(content))
    common = ("--task", "question_answering", "--init", folder / "gpt", "--out", tmp_path / "run")
    refused(run(finetune, *common, "--data", tmp_path / "x.json"), rf"finetune\.py: {message}")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_an_option_is_one_line(run, folder, tmp_path):
    common = ("--task", "question_answering", "--init", folder / "gpt", "--out", tmp_path / "run")
    for options, message in {
        "": r"data: data must be a JSON file in SQuAD's format, got none",
        "--data missing.json": r"json: missing\.json must be there, got no such file",
        "--data x --stride 0": r"data: stride must be at least 1, got 0",
        "--data x --longest 0": r"data: longest must be at least 1, got 0",
        "--data x --length 49": r"data: length must be at most the context, 48, got 49",
    }.items():
        refused(run(finetune, *common, *options.split()), rf"finetune\.py: {message}")
