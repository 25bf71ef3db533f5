"""The training loop: its numbers, its limits, its logs, and how it stops."""

import math
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_task
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_task import configuration, counting, table
from torch import nn

from lspm_models import train
from lspm_models.checkpoint import checkpoints
from lspm_models.distributed import Processes
from lspm_models.fit_config import FitConfig, learning_rate
from lspm_models.progress import Progress, duration, quantity
from lspm_models.run_log import read_log
from lspm_models.train import fit, parameter_groups


def losses(folder, column="train_loss"):
    return [float(row[column]) for row in read_log(folder / "log.csv") if row[column]]


def test_the_learning_rate_rises_and_follows_half_a_cosine():
    config = FitConfig(learning_rate=2.0, warmup=0.2, final_learning_rate=0.1)
    rates = [learning_rate(done, config) for done in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3)]
    quarter = 0.9 * math.sqrt(0.5)
    expected = [0.0, 1.0, 2.0, 1.1 + quarter, 1.1, 1.1 - quarter, 0.2, 0.2]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_it_begins_at_the_top_and_warm_up_may_fill_the_run():
    assert learning_rate(0.0, FitConfig(learning_rate=2.0, warmup=0)) == 2.0
    assert learning_rate(0.5, FitConfig(learning_rate=2.0, warmup=1)) == 1.0
    assert learning_rate(1.0, FitConfig(learning_rate=2.0, warmup=1)) == 2.0


def test_the_loop_uses_the_schedule(tmp_path):
    config = configuration(warmup=0.5)
    fit(table(), counting(), config, tmp_path)
    assert losses(tmp_path, "learning_rate") == [learning_rate(step / 12, config) for step in range(1, 13)]


def test_matrices_decay_and_nothing_else():
    model = table()
    decayed, free = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model.embedding.weight), id(model.head.weight)}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_it_learns_to_count(tmp_path):
    """Without the errors in the text, the next token is certain: the loss falls from ln 16 to nearly none."""
    data = counting(batch_size=16)
    data.training._ids = np.arange(1500) % 16
    config = configuration(steps=100, learning_rate=0.1, checkpoint_every=100, evaluate_every=50)
    result = fit(table(dropout=0.0), data, config, tmp_path)
    assert losses(tmp_path)[0] == pytest.approx(math.log(16), abs=0.5)
    assert losses(tmp_path)[-1] < 0.05
    assert result.step == 100


def test_one_step_is_what_pytorch_does(tmp_path):
    config = configuration(steps=1, clip=0.1, learning_rate=0.01, warmup=0, final_learning_rate=1)
    task, expected = table(dropout=0.0), table(dropout=0.0)
    fit(task, counting(), config, tmp_path)
    optimizer = torch.optim.AdamW(parameter_groups(expected, 0.1), lr=0.01, betas=(0.9, 0.95))
    loss = expected.loss(*counting().training.next_batch())
    loss.backward()
    squares = sum(parameter.grad.double().square().sum() for parameter in expected.parameters())
    nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    optimizer.step()
    assert losses(tmp_path) == [loss.item()]
    assert losses(tmp_path, "gradient_norm") == [squares.sqrt().float().item()]
    for ours, theirs in zip(task.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    class Whole:
        """Two batches of counting() as one."""

        fingerprint = "counting"

        def __init__(self):
            self.training, self.inner = self, counting().training

        def next_batch(self):
            pairs = [self.inner.next_batch() for _ in range(2)]
            return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))

        def state(self):
            return {}

        def validation(self):
            return iter(())

    options = {"steps": 4, "warmup": 0.0}
    fit(table(dropout=0.0), counting(), configuration(accumulation=2, **options), tmp_path / "a")
    fit(table(dropout=0.0), Whole(), configuration(**options), tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    assert losses(tmp_path / "a", "tokens") == losses(tmp_path / "b", "tokens") == [0, 64, 128, 192, 256]
    assert losses(tmp_path / "b", "validation_loss") == []


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    seen = set()
    task = table(dropout=0.0)
    task.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    fit(task, counting(), configuration(precision="bfloat16"), tmp_path / "a")
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}
    fit(table(dropout=0.0), counting(), configuration(), tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=0.02)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_row_per_step_or_as_asked(tmp_path):
    lines = []
    fit(table(), counting(), configuration(log_every=5), tmp_path, report=lines.append)
    rows = read_log(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == [0, 4, 5, 8, 10, 12]
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [0, 4, 8, 12]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows[1:])
    assert [line.split()[:3] for line in lines] == [["step", step, "training"] for step in ("4", "8", "12")]


def test_the_folder_has_a_plot_and_events(tmp_path):
    fit(table(), counting(), configuration(), tmp_path)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (960, 540)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x08, 0x51, 0x9C), (0xD9, 0x48, 0x01)} <= colours  # the training and the validation line
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation_loss")] == [0, 4, 8, 12]
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(
        losses(tmp_path), rel=1e-6
    )


def test_minutes_end_a_run_and_its_schedule(tmp_path, monkeypatch):
    """Every batch takes a second here."""
    now, data = [100.0], counting()
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    original = data.training.next_batch

    def next_batch():
        now[0] += 1
        return original()

    data.training.next_batch = next_batch
    config = configuration(steps=None, minutes=0.25)
    assert fit(table(), data, config, tmp_path).step == 15
    assert losses(tmp_path, "seconds") == list(range(16))
    assert losses(tmp_path, "learning_rate") == [learning_rate(second / 15, config) for second in range(15)]
    assert losses(tmp_path, "tokens_per_second") == [32] * 15


def test_whichever_limit_comes_first(tmp_path):
    assert fit(table(), counting(), configuration(steps=3, minutes=60.0), tmp_path).step == 3
    assert FitConfig().steps == 1000
    assert FitConfig(minutes=1.0).steps is None


class Breaks(nn.Module):
    """A task whose loss, or gradient, is spoilt at one step."""

    def __init__(self, step, spoil):
        super().__init__()
        self.table, self.calls, self.step, self.spoil = table(), 0, step, spoil

    def loss(self, inputs, targets):
        loss = self.table.loss(inputs, targets)
        self.calls += self.training
        return self.spoil(loss) if self.calls == self.step and self.training else loss


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda loss: loss * float("nan"),
            r"^fit: loss must be finite, got nan at step 5; the newest checkpoint is ",
        ),
        (
            lambda loss: loss + float("inf"),
            r"^fit: loss must be finite, got inf at step 5; the newest checkpoint is ",
        ),
        (
            lambda loss: (loss - loss.detach()).sqrt(),
            r"^fit: gradient norm must be finite, got (nan|inf) at step 5; ",
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path, spoil, message):
    task = Breaks(5, spoil)
    with pytest.raises(FloatingPointError, match=message):
        fit(task, counting(), configuration(), tmp_path)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    assert len(losses(tmp_path)) == 4


def test_the_first_step_is_named_too(tmp_path):
    with pytest.raises(FloatingPointError, match=r"got nan at step 1; there is no checkpoint yet$"):
        fit(Breaks(1, lambda loss: loss * float("nan")), counting(), configuration(), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_as_if_nothing_was(tmp_path, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    task = Breaks(5, lambda loss: os.kill(os.getpid(), number) or loss)
    result = fit(task, counting(), configuration(), tmp_path / "a")
    assert (result.interrupted, result.step, result.checkpoint.name) == (number, 5, "step-00000005")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    fit(Breaks(0, None), counting(), configuration(), tmp_path / "a", resume=True)
    fit(Breaks(0, None), counting(), configuration(), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_two_processes_train_as_one_with_both_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        environment = {
            **os.environ,
            **launched,
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, tiny_task.__file__, str(tmp_path / "two"), "4"]
        children.append(subprocess.Popen(command, env=environment))
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    data = counting(batch_size=8, validation_batches=1)
    fit(table(dropout=0.0), data, configuration(steps=4), tmp_path / "one")
    assert losses(tmp_path / "two", "tokens") == losses(tmp_path / "one", "tokens")
    for column in ("train_loss", "validation_loss", "gradient_norm"):
        assert losses(tmp_path / "two", column) == pytest.approx(losses(tmp_path / "one", column), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "training: steps must be greater than 0, got 0"),
        ({"minutes": -1.0}, "training: minutes must be greater than 0, got -1.0"),
        ({"learning_rate": math.nan}, "training: learning_rate must be greater than 0, got nan"),
        ({"learning_rate": math.inf}, "training: learning_rate must be greater than 0, got inf"),
        ({"clip": -1.0}, "training: clip must be 0 or greater, got -1.0"),
        ({"seed": 2**64}, f"training: seed must be 0 or greater and below 2 ** 64, got {2**64}"),
        ({"warmup": 1.5}, "training: warmup must be between 0 and 1, got 1.5"),
        ({"beta2": 1.0}, "training: beta2 must be at least 0 and less than 1, got 1.0"),
        ({"precision": "int8"}, "training: precision must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        FitConfig(**options)
    assert str(error.value) == message


def test_quantities_and_times_as_people_say_them():
    assert [quantity(value) for value in (950, 12_345, 4.56e6, 2e9)] == ["950", "12.3k", "4.56M", "2G"]
    assert [duration(value) for value in (5, 495, 11_295, math.inf)] == ["00:05", "08:15", "3:08:15", "--:--"]


def test_the_bar_shows_loss_speed_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = iter((0.0, 30.0))
    monkeypatch.setattr("lspm_models.progress.time.monotonic", lambda: next(now))
    progress = Progress(print, done=0.25)
    progress.update(0.5, step=12, loss=3.14159, tokens_per_second=4200.0)
    progress.line("a line that stays")
    progress.close()
    shown = capsys.readouterr()
    assert "step 12  loss 3.142  4.2k tokens/s  01:00 left" in shown.err
    assert shown.out == "a line that stays\n"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Processes().device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, message in (
        ("cuda:1", "this machine has, got 'cuda:1' with 1 CUDA GPU"),
        ("gpu7", "like cpu, cuda or cuda:1, got 'gpu7'"),
        ("mps", "like cpu, cuda or cuda:1, got 'mps'"),
    ):
        with pytest.raises(ValueError, match=f"^fit: device must be one {message}$"):
            Processes().device(name)
