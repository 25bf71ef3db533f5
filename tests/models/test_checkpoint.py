"""Checkpoints: exact, whole at any moment, and refused where they do not fit."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_task
import torch
from safetensors.torch import save_file
from tiny_task import configuration, counting, table
from torch import nn

from lspm_kernels import AdamW
from lspm_models import checkpoint
from lspm_models.run_log import read_log
from lspm_models.train import fit

CPU = torch.device("cpu")
EXACT = ("step", "train_loss", "validation_loss", "learning_rate", "gradient_norm", "tokens")


def exact(folder):
    """The columns of a log that do not depend on the clock."""
    return [[row[name] for name in EXACT] for row in read_log(folder / "log.csv")]


def start(folder, *moment):
    root = Path(tiny_task.__file__).resolve().parents[2]
    paths = [str(root / "python"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, tiny_task.__file__, str(folder), "12", *moment]
    return subprocess.Popen(command, env=environment)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    assert process.wait() == 0
    assert len(read_log(folder / "log.csv")) == 13
    return exact(folder)


# One run, killed in turn at each of these moments and resumed.
MOMENTS = (
    "lspm_models.train.learning_rate:2",  # in step 2: there is no checkpoint yet
    "safetensors.torch.save_file:2",  # between the two tensor files of the first checkpoint
    "os.replace:2",  # the first checkpoint is written, and has no name yet
    "lspm_models.files.synchronize:7",  # it has its name, which may not have reached the disk
    "shutil.rmtree:2",  # step 9 is saved, step 3 moved out of sight and not yet removed
    "lspm_models.train.learning_rate:2",  # in step 11, behind the newest checkpoint
)


@pytest.mark.long
def test_a_run_killed_again_and_again_has_the_losses_of_one_that_was_not(tmp_path, uninterrupted):
    folder, seen = tmp_path / "checkpoints", []
    for moment in MOMENTS:
        assert start(tmp_path, moment).wait() == -signal.SIGKILL
        with (tmp_path / "log.csv").open("a") as log:
            log.write("99,1.5")  # a row that the kill cut short
        seen.append([int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(folder)])
        for path in checkpoint.checkpoints(folder):
            checkpoint.load_weights(path, table())
    assert seen == [[], [], [], [3], [6, 9], [6, 9]]
    assert start(tmp_path).wait() == 0
    assert exact(tmp_path) == uninterrupted
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000012"]


def test_killed_from_outside_between_two_rows(tmp_path, uninterrupted):
    process = start(tmp_path)
    while process.poll() is None and len(read_log(tmp_path / "log.csv")) < 6:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(tmp_path).wait() == 0
    assert exact(tmp_path) == uninterrupted


def test_another_seed_would_be_noticed(tmp_path, uninterrupted):
    fit(table(), counting(seed=1), configuration(), tmp_path)
    assert exact(tmp_path)[0] == uninterrupted[0]  # the same weights and validation blocks
    assert exact(tmp_path)[1:] != uninterrupted[1:]


@pytest.fixture
def trained(tmp_path):
    """A model and an optimizer after three steps, and the checkpoint of them."""
    model = table()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, 3)
    path = checkpoint.save_checkpoint(
        tmp_path,
        3,
        model,
        optimizer,
        state={"random": [checkpoint.random_state(CPU)], "data": {"at": 2**80}},
        keep=2,
    )
    return model, optimizer, path


def step(model, optimizer, count):
    batches = counting().training
    for _ in range(count):
        model.loss(*batches.next_batch()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_weights_optimizer_and_generators_come_back(trained):
    model, optimizer, path = trained
    drawn = random.random(), np.random.rand(), torch.rand(3).tolist()
    other = table()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    random.random(), np.random.rand(), torch.rand(3)
    state = checkpoint.load_training(path, other, other_optimizer)
    checkpoint.restore_random_state(state["random"][0], CPU)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn
    assert (state["step"], state["data"]) == (3, {"at": 2**80})
    for ours, theirs in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        step(ours, theirs, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_torchs_optimizer_goes_on_in_ours(trained):
    """As that of a run from before there was ours: in the same steps, but for rounding."""
    model, optimizer, path = trained
    other = table()
    other_optimizer = AdamW(other.parameters(), lr=0.1)
    checkpoint.load_training(path, other, other_optimizer)
    for ours, theirs in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        step(ours, theirs, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(entry["step"] == 5 for entry in other_optimizer.state.values())


def test_a_checkpoint_is_tensors_and_text(trained):
    assert sorted(file.name for file in trained[2].iterdir()) == [
        "model.safetensors",
        "state.json",
        "training.safetensors",
    ]
    json.loads((trained[2] / "state.json").read_text())


def test_the_newest_are_kept(tmp_path):
    model = table()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for count in (9, 10, 100_000_001):
        checkpoint.save_checkpoint(tmp_path, count, model, optimizer, state={"random": []}, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000010", "step-100000001"]
    checkpoint.save_checkpoint(tmp_path, 10, model, optimizer, state={"random": [], "again": 1}, keep=2)
    assert checkpoint.read_state(tmp_path / "step-00000010")["again"] == 1


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight


def test_a_shared_tensor_is_written_once_and_loaded_into_both(tmp_path):
    model, other = Tied(), Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = checkpoint.save_checkpoint(tmp_path, 1, model, optimizer, state={"random": []}, keep=1)
    assert list(checkpoint.model_tensors(model)) == ["table.weight"]
    checkpoint.load_weights(path, other)
    assert torch.equal(other.head.weight, model.table.weight)


def test_weights_of_another_shape_are_refused_by_name(trained):
    path = trained[2]
    message = r"embedding\.weight must have the model's shape \(16, 9\), got \(16, 8\) in .*step-00000003$"
    with pytest.raises(ValueError, match="^checkpoint: " + message):
        checkpoint.load_weights(path, table(width=9))
    smaller = table()
    del smaller.head
    message = r"head\.bias must be in both the model and .*step-00000003, got none in the model$"
    with pytest.raises(ValueError, match="^checkpoint: " + message):
        checkpoint.load_weights(path, smaller)
    save_file({"weight": torch.ones(2, 2)}, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"^checkpoint: bias must be in both the model and .*, got none in the checkpoint$"
    ):
        checkpoint.load_weights(path, nn.Linear(2, 2))


def test_a_file_that_cannot_be_written_is_named(trained):
    model, optimizer, path = trained
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match=r"File too large.*step-00000009\.partial/model\.safetensors"):
            checkpoint.save_checkpoint(path.parent, 9, model, optimizer, state={"random": []}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert checkpoint.checkpoints(path.parent) == [path]


def test_broken_files_are_named(trained, tmp_path):
    path = trained[2]
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"^checkpoint: .*model\.safetensors must be a whole safetensors file"
    ):
        checkpoint.load_weights(path, table())
    (path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"^checkpoint: .*model\.safetensors must be there, got no such file$"
    ):
        checkpoint.load_weights(path, table())
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"^json: .*state\.json must be JSON"):
        checkpoint.read_state(path)
    with pytest.raises(
        ValueError, match=r"^checkpoint: .* must be a checkpoint folder, got no state\.json in it$"
    ):
        checkpoint.read_state(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        ({"learning_rate": 0.5}, "training.learning_rate", (0.01, 0.5)),
        ({"batch_size": 8}, "training.batch_size", (4, 8)),
        ({"precision": "bfloat16"}, "training.precision", ("float32", "bfloat16")),
    ],
)
def test_a_run_is_not_continued_in_another_way(tmp_path, change, field, values):
    fit(table(), counting(), configuration(steps=3), tmp_path)
    message = rf"^checkpoint: {field} must be {values[0]!r} as in .*step-00000003, got {values[1]!r}$"
    with pytest.raises(ValueError, match=message):
        fit(table(), counting(), configuration(steps=3, **change), tmp_path, resume=True)


def test_settings_and_data_must_be_those_of_the_checkpoint(tmp_path):
    fit(table(), counting(), configuration(steps=3), tmp_path, settings={"model": {"width": 8}})
    with pytest.raises(ValueError, match=r"^checkpoint: model\.width must be 8 as in .*, got 9$"):
        fit(table(), counting(), configuration(), tmp_path, settings={"model": {"width": 9}}, resume=True)
    data = counting()
    data.fingerprint = "other"
    with pytest.raises(
        ValueError, match=r"^checkpoint: data_fingerprint must be 'counting' as in .*, got 'other'$"
    ):
        fit(table(), data, configuration(), tmp_path, settings={"model": {"width": 8}}, resume=True)
    with pytest.raises(ValueError, match=r"^fit: folder must hold no checkpoint unless resume is true, got "):
        fit(table(), counting(), configuration(), tmp_path)


def test_a_run_that_goes_on_returns_what_the_whole_one_did(tmp_path):
    whole = fit(table(), counting(), configuration(steps=8), tmp_path)
    checkpoint.remove(whole.checkpoint)  # the one before, of step 6, lies between two evaluations
    assert fit(table(), counting(), configuration(steps=8), tmp_path, resume=True) == whole


def test_a_finished_run_goes_on_when_it_gets_more_steps(tmp_path):
    fit(table(), counting(), configuration(steps=3), tmp_path)
    result = fit(table(), counting(), configuration(steps=5), tmp_path, resume=True)
    assert (result.step, len(read_log(tmp_path / "log.csv"))) == (5, 6)
    again = fit(table(), counting(), configuration(steps=5), tmp_path, resume=True)
    assert (again.step, again.validation_loss) == (5, result.validation_loss)
