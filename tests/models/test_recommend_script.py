"""recommend.py as a person uses it: what it prints, writes and refuses, and how a run goes on."""

import csv
import json
import re
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import recommend
import torch
from PIL import Image
from test_pretrain import refused
from tiny_ratings import write_recbole

from lspm_models.checkpoint import checkpoints
from lspm_models.options import merge, read_config
from lspm_models.recommender_job import JOBS, Trained, load_recommender
from lspm_models.recommender_outputs import Evaluation, group_rows, quality, report_quality, user_groups
from lspm_models.run_log import read_log

SMALL = "--width 8 --hidden 16 --device cpu".split()
SHORT = "--steps 20 --batch-size 64 --evaluate-every 10 --checkpoint-every 5 --keep-checkpoints 9".split()
CONFIGS = Path(recommend.__file__).parent / "configs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data's folder, and for each kind of prediction a run and what it said."""
    folder, runs = tmp_path_factory.mktemp("recommend"), {}
    data = write_recbole(folder / "tiny")
    kinds = {"ratings": (), "clicks": ("--predicts", "clicks"), "scores": ("--model", "two-tower")}
    for name, options in kinds.items():
        common = ("train", "--data", data, *options, *SMALL, *SHORT, "--out", folder / name)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
            patch.setattr(sys, "argv", ["recommend.py", *map(str, common)])
            assert recommend.main() == 0
        runs[name] = folder / name, out.getvalue()
    return data, runs


def losses(path):
    return [
        [value for key, value in row.items() if "second" not in key] for row in read_log(path / "log.csv")
    ]


def test_a_run_says_what_it_does_and_where_everything_is(trained):
    _, runs = trained
    path, out = runs["ratings"]
    for pattern in (
        r"ratings    tiny: 480 to train on, 120 set aside, 40 users, 30 items\n",
        r"model      \d\.\d+k parameters: deepfm, 8 wide, 16 hidden features, histories of 200\n",
        r"step     10   training .*   validation .*   rmse \d\.\d{4}   mae \d\.\d{4}   .* ratings/s",
        r"trained    20 steps",
        r"try it     python python/recommend\.py evaluate .*/ratings\n",
        r"           python python/recommend\.py recommend .*/ratings --user \d+\n",
    ):
        assert re.search(pattern, out), pattern
    assert {"config.json", "catalogue.json", "ratings.safetensors", "checkpoints", "log.csv", "loss.png"} <= {
        file.name for file in path.iterdir()
    }
    assert "accuracy" in runs["clicks"][1]
    assert "hit_rate_10" in runs["scores"][1]


def test_resumed_it_has_the_same_losses(run, trained, tmp_path):
    path = trained[1]["ratings"][0]
    shutil.copytree(path, tmp_path / "again")
    for late in checkpoints(tmp_path / "again/checkpoints")[1:]:
        shutil.rmtree(late)
    assert run(recommend, "train", "--resume", tmp_path / "again")[0] == 0
    assert len(losses(path)) == 21
    assert losses(tmp_path / "again") == losses(path)
    message = rf"recommend\.py train: checkpoint: model\.width must be 8 as in {path}, got 9"
    refused(run(recommend, "train", "--resume", path, "--width", 9), message)


@pytest.mark.parametrize("name", ["ratings", "clicks", "scores"])
def test_it_recommends_titles_that_are_new_to_the_user(run, trained, name):
    path = trained[1][name][0]
    code, out, err = run(recommend, "recommend", path, "--user", 7, "--count", 40)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    found = load_recommender(path)
    known = found.training
    user = int(known.user_ids.internal([7]))
    seen = {known.title(int(item)) for item in known.items[known.users == user]}
    assert re.fullmatch(rf"user 7, {len(seen)} ratings, the best of Film No\. \d+; Film .*; Film .*", first)
    value = r"\d+%" if name == "clicks" else r"-?\d+\.\d\d"
    titles = []
    for place, line in enumerate(lines, 1):
        match = re.fullmatch(
            rf" +{place}  (Film No\. \d+) +({value})  \((Action|Comedy|Drama), (Even|Odd)\)", line
        )
        assert match, line
        titles.append(match[1])
    assert len(titles) + len(seen) == 30
    assert not seen & set(titles)
    items = [known.titles.index(title) for title in titles]
    scores = found.model.scores(torch.tensor([user]))[0, items].tolist()
    assert scores == sorted(scores, reverse=True)
    assert len(run(recommend, "recommend", path, "--user", 7, "--count", 40, "--seen")[1].splitlines()) == 31


def test_it_says_how_good_it_is_and_for_whom(run, trained):
    path = trained[1]["ratings"][0]
    code, out, err = run(recommend, "evaluate", path, "--k", 5)
    assert (code, err) == (0, "")
    found = json.loads((path / "metrics.json").read_text())
    assert {
        "RMSE",
        "MAE",
        "AUC",
        "precision@5",
        "NDCG@5",
        "hit rate@5",
        "coverage@5",
        "novelty@5, bits",
    } < set(found)
    last = read_log(path / "log.csv")[-1]
    assert found["RMSE"] == pytest.approx(float(last["rmse"]), rel=1e-6)
    for name, value in found.items():
        assert re.search(rf"^{re.escape(name)} +{value:.4f}$", out, re.M), name
    rows = list(csv.DictReader((path / "groups.csv").open()))
    assert [row["group"] for row in rows if row["feature"] == "gender"] == ["F", "M"]
    ages = [
        "below 18",
        "18 to below 25",
        "25 to below 35",
        "35 to below 45",
        "45 to below 50",
        "50 to below 56",
    ]
    assert [row["group"] for row in rows if row["feature"] == "age"] == ages
    for feature in ("gender", "age"):  # the groups have every rating once
        mine = [row for row in rows if row["feature"] == feature]
        total = sum(float(row["RMSE"]) ** 2 * int(row["ratings"]) for row in mine)
        assert sum(int(row["ratings"]) for row in mine) == 120
        assert (total / 120) ** 0.5 == pytest.approx(found["RMSE"])
    with Image.open(path / "groups.png") as picture:
        assert picture.size[0] > 1000
    assert "log-loss" in run(recommend, "evaluate", trained[1]["clicks"][0])[1]
    out = run(recommend, "evaluate", trained[1]["scores"][0])[1]
    assert "RMSE" not in out
    assert "gender F" in out
    message = r"recommend\.py evaluate: groups: users must have the feature, of gender, age, got 'city'"
    refused(run(recommend, "evaluate", path, "--groups", "city"), message)


class Table:
    """A model that is a table, as one that fit() does not train."""

    def __init__(self, table):
        self.table = table

    def predict(self, users, items):
        return self.table[users, items]

    def scores(self, users):
        return self.table[users]


def test_groups_are_told_apart(trained, tmp_path):
    """A model that promises women one too much and shows men one and the same film."""
    found = load_recommender(trained[1]["ratings"][0])
    gender = user_groups(found.training, ("gender",))["gender"]
    women = gender[1] == gender[0].index("F")
    table, held_out = torch.rand(40, 30), found.held_out.subset(found.held_out.items != 3)
    table[~women, 3] = 9.0
    table[held_out.users, held_out.items] = held_out.ratings + women[held_out.users]
    known = found.training.subset(found.training.items != 3)
    model = Trained(tmp_path, Table(table), known, held_out, found.data, "ratings")
    predicted = model.model.predict(held_out.users, held_out.items)
    rows = group_rows(model, predicted, quality(model, predicted, 1)[0], {"gender": gender})
    assert [(row["group"], row["RMSE"], row["mean error"]) for row in rows] == [("F", 1, 1), ("M", 0, 0)]
    assert rows[1]["coverage"] == pytest.approx(1 / 30)
    assert rows[0]["coverage"] > rows[1]["coverage"]
    lines = []
    report_quality(model, Evaluation(), lines.append)
    assert any(line.startswith("gender F") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train --model svd",
            r"train: model: name must be one of mlp, wide-deep, deepfm, dcn, two-tower, mf, got 'svd'",
        ),
        ("train --widht 3", r"train: unknown option --widht; did you mean --width\?"),
        (
            "train --data gone",
            r"train: ratings: 'gone' must be a file, a folder or ml-100k, got no such path",
        ),
        ("train --fold 5", r"train: data: fold must be 0 to 4, got 5"),
        ("train --folds 1", r"train: data: folds must be at least 2, got 1"),
        ("train --columns a=b", r"train: data: columns must be such as user=NAME, of .*, got 'a=b'"),
        ("train --predicts x", r"train: --predicts: invalid choice: 'x' .*"),
        (
            "evaluate gone",
            r"evaluate: checkpoint: gone must be a run folder or a checkpoint, got no such folder",
        ),
        ("fly", r"command must be train, evaluate or recommend, got 'fly'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, tmp_path, arguments, message):
    out = ["--out", tmp_path / "run"] if arguments.startswith("train") else []
    separator = ":" if arguments == "fly" else ""
    refused(run(recommend, *arguments.split(), *out), rf"recommend\.py{separator} {message}")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_script(run, tmp_path, trained):
    path = shutil.copytree(trained[1]["ratings"][0], tmp_path / "run")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"model": {"model": "llama"}}))
    message = rf"recommend\.py evaluate: recommend: {path} must be a run of a recommender, got another"
    refused(run(recommend, "evaluate", path), message)


def test_who_is_not_known_and_what_is_missing(run, trained):
    path = trained[1]["ratings"][0]
    message = r"recommend\.py recommend: recommend: user must be one of the 40 known, got 'x'"
    refused(run(recommend, "recommend", path, "--user", "x"), message)
    message = r"recommend\.py recommend: output: --user must be the id of a user, got none"
    refused(run(recommend, "recommend", path), message)
    message = r"recommend\.py recommend: output: count must be at least 1, got 0"
    refused(run(recommend, "recommend", path, "--user", 1, "--count", 0), message)
    refused(
        run(recommend, "evaluate", path, "--k", 0),
        r"recommend\.py evaluate: output: k must be at least 1, got 0",
    )


def test_the_help_is_a_page(run):
    pages = {
        (): ("commands:", "train      ", "evaluate   ", "recommend  ", "examples"),
        ("train", "--help"): (
            "\nmodel:\n",
            "\nratings:\n",
            "[ml-100k]",
            "[deepfm]",
            "--fold N",
            "recommend.py train",
        ),
        ("train", "--model", "two-tower", "--help"): ("--temperature", "[two-tower]"),
        ("evaluate", "--help"): ("evaluate RUN [options]", "--k N", "--groups"),
        ("recommend", "--help"): ("recommend RUN [options]", "--user NAME", "--count N"),
    }
    for arguments, parts in pages.items():
        code, out, _ = run(recommend, *arguments)
        assert code == 0
        assert all(len(line) <= 110 for line in out.splitlines())
        for part in parts:
            assert part in out, part


def test_the_bundled_config_is_valid():
    for path in CONFIGS.glob("recommender*.toml"):
        content = read_config(path)
        job = JOBS[content["model"]["model"]]
        merged = merge(job.sections, [job.defaults, content])
        for name, options in merged.items():
            job.sections[name](**options)
        assert merged["data"]["data"] == "ml-100k"
