"""Classification: its loss and accuracy, its pictures, and the scripts with images as a person uses them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO

import finetune
import numpy as np
import predict
import pretrain
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from test_pretrain import SCRIPTS, refused
from tiny_images import write_idx

from lspm_models.checkpoint import checkpoints
from lspm_models.data.image_config import ImageConfig, ImageFormat
from lspm_models.data.image_formats import Images
from lspm_models.data.images import ImageData
from lspm_models.fit_config import FitConfig
from lspm_models.image_job import load_image_model
from lspm_models.image_outputs import predict as predict_all
from lspm_models.models.resnet import ResNet, ResNetConfig
from lspm_models.run_log import read_log
from lspm_models.tasks.classification import Classification
from lspm_models.train import fit

LOOK = ImageFormat(("dark", "left", "right"), 1, 8, (0.3,), (0.3,))
TINY = ResNetConfig(layers=(1, 1, 1, 1), width=8, channels=1, stem=3, stem_stride=1, stem_pool=False)
SMALL = "--model resnet10 --width 8 --stem 3x3 --batch-size 6 --device cpu --validation 0.25".split()
SHORT = (
    "--steps 6 --evaluate-every 3 --checkpoint-every 2 --evaluation-batches 2 --label-smoothing 0.1".split()
)
VARIED = "--crop 1 --flip --mixup 0.3".split()


def shapes(count=120):
    """Noise that is dark, or bright on the left, or bright on the right."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = generator.integers(90, size=(count, 1, 8, 8), dtype=np.uint8)
    pixels[labels == 1, :, :, :4] += 120
    pixels[labels == 2, :, :, 4:] += 120
    return Images(labels, pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    images, path = shapes(), tmp_path_factory.mktemp("data") / "shapes"
    write_idx(path, images.pixels, images.labels)
    return path


def losses(path):
    names = ("step", "train_loss", "validation_loss", "accuracy", "learning_rate", "gradient_norm", "images")
    return [[row[name] for name in names] for row in read_log(path / "log.csv")]


def make_task(**options):
    torch.manual_seed(0)
    return Classification(ResNet(TINY), 3, **options)


def test_the_loss_and_what_is_measured():
    task = make_task(label_smoothing=0.2).eval()
    images, targets = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 2, 0])
    logits = task(images)
    smooth = torch.nn.functional.one_hot(targets, 3) * 0.8 + 0.2 / 3
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.loss(images, targets), expected)
    mixed = torch.tensor([[0.3, 0.7, 0.0]]).repeat(5, 1)
    expected = -((mixed * 0.8 + 0.2 / 3) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.loss(images, mixed), expected)
    loss, sums = task.evaluate(images, targets)
    torch.testing.assert_close(loss, -logits.log_softmax(1)[range(5), targets].mean())
    correct = (logits.argmax(1) == targets).sum().item()
    assert sums.tolist() == [correct, 5]
    assert task.metrics([3.0, 4.0]) == {"accuracy": 0.75}


def test_it_learns_what_can_be_seen(tmp_path):
    images = shapes()
    data = ImageData(images, images.subset(np.arange(30)), LOOK, ImageConfig(), 20, validation_batches=5)
    options = {"learning_rate": 1e-2, "weight_decay": 0.0, "evaluate_every": 30, "checkpoint_every": 30}
    before = predict_all(make_task(), data).accuracy  # of two batches of different sizes
    lines, config = [], FitConfig(steps=30, batch_size=20, device="cpu", **options)
    result = fit(make_task(), data, config, tmp_path, report=lines.append)
    rows = read_log(tmp_path / "log.csv")
    assert float(rows[0]["accuracy"]) == pytest.approx(before)
    assert float(rows[1]["train_loss"]) > 0.6
    assert float(rows[-1]["train_loss"]) < 0.1
    assert (float(rows[-1]["accuracy"]), rows[-1]["images"], result.step) == (1.0, "600", 30)
    assert re.fullmatch(r"step     30   training .*   accuracy 1\.0000   learning .* images/s", lines[0])


def test_predictions_keep_the_worst_mistakes():
    images = shapes(30)
    task, data = make_task(), ImageData(images, images, LOOK, ImageConfig(), 7)
    found = predict_all(task, data, most=4)
    with torch.no_grad():
        logits = task.eval()(LOOK.normalised(torch.from_numpy(images.pixels)))
    torch.testing.assert_close(found.probabilities, logits.softmax(1))
    assert found.labels.tolist() == images.labels.tolist()
    confidence = torch.where(found.predicted != found.labels, found.probabilities.amax(1), 0)
    assert found.places.tolist() == confidence.argsort(descending=True, stable=True)[:4].tolist()
    torch.testing.assert_close(found.mistakes[0], torch.from_numpy(images.pixels[found.places[0]]) / 255)
    assert (
        found.accuracy
        == found.plain_accuracy
        == pytest.approx((logits.argmax(1) == found.labels).double().mean().item())
    )
    mirrored = predict_all(task, ImageData(images, images, LOOK, ImageConfig(flip=True), 7))
    with torch.no_grad():
        mirror = task(LOOK.normalised(torch.from_numpy(images.pixels).flip(3)))
    torch.testing.assert_close(mirrored.probabilities, (logits.softmax(1) + mirror.softmax(1)) / 2)
    assert mirrored.plain_accuracy == found.accuracy
    empty = ImageData(images, images.subset(np.arange(0)), LOOK, ImageConfig(), 7)
    with pytest.raises(ValueError, match=r"^predict: images must be set aside, got none that can be read$"):
        predict_all(task, empty)


@pytest.fixture(scope="module")
def trained(folder):
    """A run that all tests look at, and what it said."""
    path = folder.parent / "run"
    arguments = map(str, ("--data", folder, *SMALL, *SHORT, *VARIED, "--out", path))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(sys, "argv", ["pretrain.py", *arguments])
        assert pretrain.main() == 0
    return path, out.getvalue()


def test_a_run_says_what_it_does_and_where_everything_is(run, trained, folder, tmp_path):
    path, out = trained
    for pattern in (
        r"images     shapes: 90 to train on, 30 to validate on, 3 classes, 8 x 8 grey",
        r"model      77\.4k parameters: 4 basic blocks, 8 to 64 features, 3 classes",
        r"step      3   training .*   validation .*   accuracy \d\.\d{4}   learning .* images/s",
        r"accuracy   \d+\.\d\d% of 30 images set aside, \d+ wrong, each seen .*; \d+\.\d\d% without",
        r"pictures   .*/confusion\.png, mistakes\.png",
        r"try it     python python/predict\.py .*run image\.png",
    ):
        assert re.search(pattern, out), pattern
    assert {"config.json", "images.json", "checkpoints", "log.csv", "confusion.png", "mistakes.png"} <= {
        file.name for file in path.iterdir()
    }
    assert len(losses(path)) == 7
    Image.new("L", (8, 8), 10).save(tmp_path / "x.png")
    (tmp_path / "y.png").write_text("")
    code, out, err = run(predict, path, tmp_path / "x.png", tmp_path / "y.png", "--top", 2)
    assert re.fullmatch(rf"{tmp_path}/x\.png   \d \d+\.\d%  \d \d+\.\d%\n", out)
    assert (code, err) == (1, f"predict.py: {tmp_path}/y.png: cannot identify image file\n")
    said = f"predict.py: {tmp_path}/z.png: No such file or directory\n"
    assert run(predict, path, tmp_path / "z.png") == (1, "", said)
    refused(run(predict, path, "x", "--top", 0), r"predict\.py: output: top must be at least 1, got 0")
    message = r"predict\.py: output: question must be beside text, got 'y' alone"
    refused(run(predict, path, "x", "--question", "y"), message)


def test_the_folder_gives_the_model_back(trained):
    path, _ = trained
    task, look = load_image_model(path)
    older, _ = load_image_model(checkpoints(path / "checkpoints")[0])
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(task(images), older(images))
    assert (look.classes, look.size, task.training) == (("0", "1", "2"), 8, False)


@pytest.mark.long
def test_killed_and_resumed_it_has_the_same_losses(trained, folder, tmp_path):
    path, command = tmp_path / "killed", [sys.executable, SCRIPTS / "pretrain.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the loss depends on them in its last bits
    arguments = ["--data", folder, *SMALL, *SHORT, *VARIED, "--out", path]
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(read_log(path / "log.csv")) < 4:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--resume", path], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert losses(path) == losses(trained[0])


def test_fine_tuning_replaces_the_head_where_the_classes_are_others(run, trained, folder, tmp_path):
    path, _ = trained
    images = shapes()
    write_idx(tmp_path / "two", images.pixels[images.labels < 2], images.labels[images.labels < 2])
    common = ("--init", path, *SHORT, "--batch-size", 6, "--device", "cpu", "--validation", 0.25)
    code, out, err = run(
        finetune, *common, "--data", tmp_path / "two", "--freeze", 4, "--out", tmp_path / "a"
    )
    assert (code, err) == (0, "")
    assert "head       a new one, for 2 classes" in out
    task, look = load_image_model(tmp_path / "a")
    before, former = load_image_model(path)
    assert (look.classes, look.mean) == (("0", "1"), former.mean)
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, task.model.state_dict()[name]) != name.startswith("layer4"), name
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (settings["model"]["width"], settings["training"]["learning_rate"]) == (8, 5e-4)
    code, out, _ = run(finetune, *common, "--data", folder, "--out", tmp_path / "b")
    assert (code, "head" in out) == (0, False)
    first = float(losses(tmp_path / "b")[0][2])
    assert first == pytest.approx(float(losses(path)[-1][2]), rel=1e-6)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    settings["init"] = str(tmp_path / "gone")  # a run goes on without what it began with
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    for path in checkpoints(tmp_path / "a" / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        state["settings"]["init"] = settings["init"]
        (path / "state.json").write_text(json.dumps(state))
    assert run(finetune, "--resume", tmp_path / "a", "--steps", 8)[0] == 0
    assert len(losses(tmp_path / "a")) == 9


def test_fine_tuning_from_torchvisions_weights(run, folder, tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    arguments = ("--init", tmp_path / "w.safetensors", "--data", folder, "--size", 32, "--freeze", 5, *SHORT)
    options = ("--batch-size", 4, "--device", "cpu", "--validation", 0.25)
    code, out, err = run(finetune, *arguments, *options, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "32 x 32 colour" in out
    task, look = load_image_model(tmp_path / "run")
    assert look.mean == (0.485, 0.456, 0.406)
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])
    refused(
        run(finetune, *arguments, *options, "--channels", 1, "--out", tmp_path / "x"),
        r"finetune\.py: data: channels must be 3 as in .*w\.safetensors, got 1",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model resnet19", r"model: name must be one of gpt, llama, bert, resnet10, .*, got 'resnet19'"),
        ("--model resnet50 --width 0", r"ResNetConfig: width must be a positive integer, got 0"),
        ("--model resnet18 --widht 3", r"unknown option --widht; did you mean --width\?"),
        ("--model resnet18 --data missing", r"images: 'missing' must be a file, .*, got no such path"),
        ("--model resnet18 --crop -1", r"data: crop must be at least 0, got -1"),
        ("--width 30 --heads 4", r"GPTConfig: width must be a multiple of heads \(4\), got 30"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, tmp_path, arguments, message):
    refused(run(pretrain, *arguments.split(), "--out", tmp_path / "run"), rf"pretrain\.py: {message}")
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_images_or_another_shape_is_not_resumed(run, trained, folder):
    path, _ = trained
    message = rf"pretrain\.py: checkpoint: model\.width must be 8 as in {path}, got 16"
    refused(run(pretrain, "--resume", path, "--width", 16), message)
    images = shapes()
    images.pixels[0, 0, 0, 0] += 1
    write_idx(folder, images.pixels, images.labels)
    message = r"pretrain\.py: checkpoint: data_fingerprint must be '\w+' as in .*, got '\w+'"
    refused(run(pretrain, "--resume", path), message)
    write_idx(folder, shapes().pixels, images.labels)


def test_the_help_for_images_is_a_page_of_its_own(run):
    for script in (pretrain, finetune):
        code, out, _ = run(script, "--model", "resnet50", "--help")
        assert code == 0
        assert all(len(line) <= 110 for line in out.splitlines())
        for part in ("\nmodel:\n", "\nimages:\n", "--label-smoothing", "[fashion-mnist]", "\nexamples\n"):
            assert part in out
        assert "--corpus" not in out
    assert "--freeze" in out
    assert "learning rate after warm-up [0.0005]" in out
