"""recommend.py with --model mf, as a person uses it: epochs of its own, checkpoints, resuming, Ctrl-C."""

import json
import re
import shutil
import signal
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest
import recommend
import torch
from test_pretrain import refused
from tiny_ratings import write_recbole

from lspm_models.checkpoint import checkpoints, read_tensors
from lspm_models.distributed import Processes
from lspm_models.models.matrix_factorization import MatrixFactorization
from lspm_models.recommender_job import load_recommender

METHODS = ["sgd", "als", "nmf", "svd", "bpr", "implicit-als"]
EPOCHS = ("--epochs", 4, "--save-every", 1, "--keep-checkpoints", 9, "--factors", 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_recbole(tmp_path_factory.mktemp("ratings") / "tiny")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of each method and what it said."""
    folder, runs = tmp_path_factory.mktemp("factorised"), {}
    for method in METHODS:
        arguments = ("train", "--model", "mf", "--method", method, "--data", data, *EPOCHS)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
            patch.setattr(sys, "argv", ["recommend.py", *map(str, (*arguments, "--out", folder / method))])
            assert recommend.main() == 0
        runs[method] = folder / method, out.getvalue()
    return runs


def tensors(path):
    return read_tensors(checkpoints(path / "checkpoints")[-1] / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_says_what_it_does_and_where_everything_is(trained, method):
    path, out = trained[method]
    errors = ", of the ratings set aside RMSE \\d\\.\\d{4}, MAE \\d\\.\\d{4}"
    errors = "" if method in ("bpr", "implicit-als") else errors
    for pattern in (
        r"ratings    tiny: 480 to train on, 120 set aside, 40 users, 30 items\n",
        rf"model      {method}, 6 factors, 4 epochs\n",
        rf"epoch    4  loss -?\d+\.\d{{4}}{errors}\n",
        r"trained    4 epochs",
        r"try it     python python/recommend\.py evaluate .*\n",
    ):
        assert re.search(pattern, out), pattern
    assert [p.name for p in checkpoints(path / "checkpoints")] == [f"step-{n:08d}" for n in range(1, 5)]


def test_one_of_a_kind_has_no_plural(run, data, tmp_path):
    arguments = ("--method", "svd", "--data", data, "--epochs", 1, "--factors", 1, "--out", tmp_path / "run")
    _, out, _ = run(recommend, "train", "--model", "mf", *arguments)
    assert "model      svd, 1 factor, 1 epoch\n" in out and "trained    1 epoch; this session" in out


def test_many_processes_are_refused(run, data, tmp_path, monkeypatch):
    two = SimpleNamespace(join=lambda: Processes(0, 2))
    monkeypatch.setattr("lspm_models.factorization_job.Processes", two)
    result = run(recommend, "train", "--model", "mf", "--data", data, "--out", tmp_path / "run")
    refused(result, "recommend.py train: run: --model mf must be trained by one process, got 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", METHODS)
def test_resumed_it_has_the_same_bits(run, trained, tmp_path, method):
    path = trained[method][0]
    shutil.copytree(path, tmp_path / "again")
    for late in checkpoints(tmp_path / "again/checkpoints")[2:]:
        shutil.rmtree(late)
    code, out, err = run(recommend, "train", "--resume", tmp_path / "again")
    assert (code, err) == (0, "") and "epoch    3" in out and "epoch    2" not in out
    expected = tensors(path)
    for name, tensor in tensors(tmp_path / "again").items():
        assert torch.equal(tensor, expected[name]), name


def test_it_stops_at_ctrl_c_and_goes_on_with_the_same_bits(run, data, trained, tmp_path, monkeypatch):
    own = MatrixFactorization.fit

    def fit(model, interactions, after_epoch):
        def interrupted(epoch, *rest):
            if epoch == 2:
                signal.raise_signal(signal.SIGINT)
            return after_epoch(epoch, *rest)

        return own(model, interactions, interrupted)

    out = ("--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(MatrixFactorization, "fit", fit)
        code, said, _ = run(recommend, "train", "--model", "mf", "--data", data, *EPOCHS, *out)
    assert code == 128 + signal.SIGINT
    go_on = f"  python python/recommend.py train --resume {out[1]}"
    assert f"interrupted after epoch 2, which is saved; go on with\n{go_on}" in said
    assert run(recommend, "train", "--resume", out[1])[0] == 0
    expected = tensors(trained["sgd"][0])
    assert all(torch.equal(t, expected[name]) for name, t in tensors(out[1]).items())


@pytest.mark.parametrize("method", METHODS)
def test_it_recommends_what_is_new_to_the_user(run, trained, method):
    path = trained[method][0]
    code, out, err = run(recommend, "recommend", path, "--user", 7, "--count", 40)
    assert (code, err) == (0, "")
    found = load_recommender(path)
    known, user = found.training, int(found.training.user_ids.internal([7]))
    seen = {known.title(int(item)) for item in known.items[known.users == user]}
    titles = re.findall(r"^ +\d+  (Film No\. \d+) ", out, re.M)
    assert len(titles) + len(seen) == 30 and not seen & set(titles)
    scores = found.model.scores(torch.tensor([user]))[0, [known.titles.index(t) for t in titles]]
    assert torch.allclose(scores, scores.sort(descending=True).values)


@pytest.mark.parametrize("method", ["bpr", "implicit-als"])
def test_it_says_that_counts_are_left_out(run, tmp_path, method):
    (tmp_path / "plays.csv").write_text("user,item,count\na,x,9\na,y,1\nb,x,2\nb,z,4\nc,y,3\n")
    options = ("--method", method, "--data", tmp_path / "plays.csv", *EPOCHS, "--out", tmp_path / "run")
    code, said, err = run(recommend, "train", "--model", "mf", *options)
    assert (code, err) == (0, "")
    assert ("weights    are left out: bpr takes each rating as one\n" in said) == (method == "bpr")


@pytest.mark.parametrize("method", ["sgd", "bpr"])
def test_it_says_how_good_it_is(run, trained, method):
    path = trained[method][0]
    assert run(recommend, "evaluate", path, "--k", 5)[0] == 0
    found = json.loads((path / "metrics.json").read_text())
    assert {"AUC", "NDCG@5", "coverage@5"} <= set(found)
    assert ("RMSE" in found) == (method == "sgd")


def test_what_is_finished_is_not_begun_anew(run, trained, tmp_path):
    path = shutil.copytree(trained["als"][0], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MatrixFactorization, "fit", lambda *_: pytest.fail("nothing is left to do"))
        code, said, _ = run(recommend, "train", "--resume", path)
    assert code == 0 and "trained    4 epochs" in said
    message = rf"recommend\.py train: model: name must be mf as in {path}, got deepfm"
    refused(run(recommend, "train", "--resume", path, "--model", "deepfm"), message)


def test_of_ratings_that_are_all_alike_the_metrics_are_json_too(run, tmp_path):
    """There is no AUC; and whoever rated an item twice has it once among the best."""
    pairs = [(user, item) for user in "abcde" for item in "xyxyz"]
    (tmp_path / "plays.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in pairs))
    where = ("--data", tmp_path / "plays.csv", "--out", tmp_path / "run")
    assert run(recommend, "train", "--model", "mf", *where, *EPOCHS)[0] == 0
    assert run(recommend, "evaluate", tmp_path / "run")[0] == 0
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["AUC"] is None
    best = (
        run(recommend, "recommend", tmp_path / "run", "--user", "a")[1].splitlines()[0].split("best of ")[1]
    )
    assert sorted(best.split("; ")) == sorted(set(best.split("; ")))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--factors 0", r"mf: factors must be at least 1, got 0"),
        ("--method svm", r"--method: invalid choice: 'svm' .*"),
        ("--epochs 0", r"training: epochs must be at least 1, got 0"),
        ("--lr -1", r"mf: lr must be positive, got -1\.0"),
        ("--seed 9223372036854775808", r"training: seed must be below 2 \*\* 63, got 9223372036854775808"),
        (
            "--split-seed 4294967296",
            r"data: split_seed must be 0 or greater and below 2 \*\* 32, got 4294967296",
        ),
        ("--items gone.csv", r"ratings: items must be a file, got no such path: gone\.csv"),
        ("--users /", r"ratings: users must be a file, got a folder: /"),
    ],
)
def test_a_mistake_is_one_line(run, data, tmp_path, arguments, message):
    out = ("--out", tmp_path / "run")
    call = ("train", "--model", "mf", "--data", data, *arguments.split(), *out)
    refused(run(recommend, *call), rf"recommend\.py train: {message}")
    assert not (tmp_path / "run").exists()
