"""U-Nets and detectors by the scripts, as a person uses them: what they print, write, draw and refuse."""

import csv
import re
import shutil
import sys
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
from test_pretrain import refused
from tiny_images import write_idx
from tiny_scenes import NAMES, write_coco, write_voc

from lspm_models.checkpoint import checkpoints
from lspm_models.data.image_config import ImageFormat
from lspm_models.image_job import load_image_model
from lspm_models.pictures import boxed, colour, tinted
from lspm_models.run_log import read_log
from lspm_models.scene_job import UNetOptions, load_scene_model
from lspm_models.scene_outputs import look_at
from lspm_models.tasks.detection import Found

SMALL = "--backbone resnet10 --width 8 --stem 3x3/2 --features 8 --size 48 --device cpu".split()
SHORT = "--steps 6 --batch-size 4 --evaluate-every 3 --checkpoint-every 2 --keep-checkpoints 9".split()
MODELS = ("unet", "detector")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each model a run, what it said, and how its scenes are given: a U-Net's as COCO's, with damage."""
    folder, runs = tmp_path_factory.mktemp("scenes"), {}
    write_coco(folder / "coco", count=12)
    (folder / "coco/6.png").write_bytes((folder / "coco/6.png").read_bytes()[:900])
    (folder / "coco/4.png").unlink()
    write_voc(folder / "voc", count=12)
    for model, data in (("unet", folder / "coco/all.json"), ("detector", folder / "voc")):
        common = ("--model", model, "--data", data, "--flip", *SMALL, *SHORT)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
            patch.setattr(sys, "argv", ["pretrain.py", *map(str, (*common, "--out", folder / model))])
            assert pretrain.main() == 0
        runs[model] = folder / model, out.getvalue(), data
    return runs


def losses(path):
    return [
        [value for name, value in row.items() if "second" not in name] for row in read_log(path / "log.csv")
    ]


@pytest.mark.parametrize("model", MODELS)
def test_a_run_says_what_it_does_and_where_everything_is(trained, model):
    path, out, _ = trained[model]
    patterns = {
        "unet": (
            r"skipped    1 that cannot be used: .*/4\.png \(no such file\)\n",
            r"skipped    .*/6\.png: .* \(image 1 left out\)\n",
            r"scenes     all\.json: 9 to train on, 2 to validate on, \d+ objects of 2 classes, 48 x 48",
            r"model      \d+k parameters: 4 basic blocks, 8 to 64 features, below a unet of 8",
            r"step      3   training .*   mean_iou \d\.\d{4}   pixel_accuracy \d\.\d{4}   .* images/s",
            r"mean IoU   \d\.\d{4} of 2 images set aside; \d+\.\d\d% of the pixels are right",
            r"           background (nan|\d\.\d{3})  lies (nan|\d\.\d{3})  stands (nan|\d\.\d{3})\n",
        ),
        "detector": (
            r"scenes     voc: 10 to train on, 2 to validate on, \d+ objects of 2 classes, 48 x 48",
            r"model      \d+\.\dk parameters: 4 basic blocks, 8 to 64 features, below a detector of 8",
            r"step      3   training .*   ap50 \d\.\d{4}   learning .* images/s",
            r"AP50       \d\.\d{4} of 2 images set aside",
            r"           lies (nan|\d\.\d{3})  stands (nan|\d\.\d{3})\n",
        ),
    }[model]
    for pattern in (*patterns, r"pictures   .*/found\.png; classes\.csv has", r"try it     .*predict\.py"):
        assert re.search(pattern, out), pattern
    assert {"config.json", "images.json", "checkpoints", "log.csv", "classes.csv", "found.png"} <= {
        file.name for file in path.iterdir()
    }
    rows = list(csv.DictReader((path / "classes.csv").open()))
    assert [row["class"] for row in rows] == [*["background"] * (model == "unet"), *NAMES]
    metric, column = {"unet": ("mean_iou", "iou"), "detector": ("ap50", "ap50")}[model]
    # Two images are set aside, as many as an evaluation sees, and the last one is of the same weights.
    found = [float(row[column]) for row in rows]
    assert np.nanmean(found) == pytest.approx(float(read_log(path / "log.csv")[-1][metric]), rel=1e-6)
    with Image.open(path / "found.png") as page:
        assert page.size == ((6 * 296, 318) if model == "unet" else (4 * 296, 318))


@pytest.mark.parametrize("model", MODELS)
def test_resumed_it_has_the_same_losses(run, trained, tmp_path, model):
    path, _, data = trained[model]
    shutil.copytree(path, tmp_path / "again")
    for late in checkpoints(tmp_path / "again/checkpoints")[1:]:
        shutil.rmtree(late)
    assert run(pretrain, "--resume", tmp_path / "again")[0] == 0
    assert len(losses(path)) == 7
    assert losses(tmp_path / "again") == losses(path)
    message = rf"pretrain\.py: checkpoint: model\.features must be 8 as in {path}, got 9"
    refused(run(pretrain, "--resume", path, "--features", 9), message)
    target = data / "Annotations/0.xml" if data.is_dir() else data
    text = target.read_text()
    target.write_text(re.sub(r"<xmax>\d+|\"bbox\": \[\d+", lambda found: found[0][:-1] + "1", text, count=1))
    message = r"pretrain\.py: checkpoint: data_fingerprint must be '\w+' as in .*, got '\w+'"
    refused(run(pretrain, "--resume", path), message)
    target.write_text(text)


@pytest.mark.parametrize("model", MODELS)
def test_it_says_and_draws_what_is_on_an_image(run, trained, tmp_path, model):
    path, _, _ = trained[model]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (90, 60), 90).save(tmp_path / folder / "x.png")
    (tmp_path / "bad.png").write_text("")
    images = tmp_path / "a/x.png", tmp_path / "bad.png", tmp_path / "b/x.png"
    code, out, err = run(predict, path, *images, "--pictures", tmp_path / "drawn", "--score", 0)
    assert (code, err) == (1, f"predict.py: {tmp_path}/bad.png: cannot identify image file\n")
    thing = {
        "unet": r"(background|lies|stands) \d+\.\d%",
        "detector": r"(lies|stands) 0\.\d\d at \d+ \d+ \d+ \d+",
    }[model]
    lines = out.splitlines()
    for line, name, drawn in zip(lines, ("a/x.png", "b/x.png"), ("x.png", "x-2.png"), strict=True):
        assert re.fullmatch(rf"{tmp_path}/{name}   {thing}(  {thing})*   {tmp_path}/drawn/{drawn}", line), (
            line
        )
        with Image.open(tmp_path / "drawn" / drawn) as picture:
            assert picture.size == (90, 60)
    if model == "detector":
        corners = [list(map(int, found)) for found in re.findall(r"at (\d+) (\d+) (\d+) (\d+)", lines[0])]
        assert max(corner[2] for corner in corners) > 48  # in pixels of the file
        assert all(x1 <= 90 and y1 <= 60 for _, _, x1, y1 in corners)
    run(predict, path, images[0])
    assert (path / "predictions/x.png").exists()
    refused(
        run(predict, path, "x", "--score", 2), r"predict\.py: output: score must be between 0 and 1, got 2\.0"
    )


def test_a_mask_covers_the_image_and_not_its_padding(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    task = UNetOptions(width=8, features=8).task(1).eval()
    task.forward = lambda images: torch.cat((torch.full_like(images[:, :1], 0.8), images[:, :1]), 1)
    look = ImageFormat(("white",), 3, 40, (0.0,) * 3, (1.0,) * 3)
    words, picture = look_at(task, look, tmp_path / "x.png")
    assert words == "background 75.0%  white 25.0%"
    changed = (np.asarray(picture) != pixels).any(2)
    assert changed[:, :20].all()
    assert not changed[:, 20:].any()


def test_pictures_have_the_colours_of_the_classes():
    photo = Image.new("RGB", (60, 50), (10, 20, 30))
    mask = np.zeros((50, 60), np.int64)
    mask[10:20, 30:40], mask[0] = 2, -1
    found = np.asarray(tinted(photo, mask, 1.0))
    assert (found[10:20, 30:40] == colour(1)).all()
    assert (found[mask <= 0] == (10, 20, 30)).all()
    boxes = Found(torch.tensor([[20.0, 25, 41, 45]]), torch.tensor([0.9]), torch.tensor([1]))
    drawn = np.asarray(boxed(photo, boxes, "ab", np.array([[2.0, 30, 12, 40]])))
    ring = (drawn == colour(1)).all(2)
    assert ring[24:46, 19].all()
    assert ring[24:46, 41].all()
    assert ring[45, 19:42].all()
    assert not ring[25:45, 20:41].any()
    assert (drawn[28:42, 0] == 255).all()
    assert len({colour(label) for label in range(20)}) == 20


def near(task, stored, prefix="model."):
    """Whether a task's weights are, but for one step at a rate of nearly nothing, the stored ones."""
    mine = task.state_dict()
    names = [name for name in stored if "conv" in name or "downsample.0" in name]
    assert names
    return all(torch.allclose(mine[prefix + name], stored[name], atol=1e-6) for name in names)


STILL = "--steps 1 --learning-rate 1e-9 --batch-size 2 --size 48 --device cpu --evaluation-batches 1".split()


@pytest.mark.parametrize("model", MODELS)
def test_fine_tuning_begins_with_a_backbone(run, trained, tmp_path, model):
    *_, data = trained[model]
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    begun = ("--model", model, "--data", data, *STILL)
    code, out, err = run(finetune, *begun, "--init", tmp_path / "w.safetensors", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "w.safetensors; all above the backbone is new" in out
    task, look = load_scene_model(tmp_path / "a")
    assert look.mean == (0.485, 0.456, 0.406)
    assert near(task.model.backbone, theirs.state_dict(), "")
    grey = write_idx(tmp_path / "grey")
    resnet = ("--model", "resnet10", "--width", 8, "--stem", "3x3/2", *STILL[:-2], "--validation", 0.3)
    for channels in (1, 3):
        options = ("--channels", channels, "--out", tmp_path / f"resnet{channels}")
        assert run(pretrain, *resnet, "--data", grey, *options)[0] == 0
    code, out, err = run(finetune, *begun, "--init", tmp_path / "resnet3", "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    task, look = load_scene_model(tmp_path / "b")
    before, former = load_image_model(tmp_path / "resnet3")
    assert (task.config.backbone.width, look.mean) == (8, former.mean)
    assert near(task.model.backbone, before.model.state_dict(), "")
    message = r"finetune\.py: checkpoint: .* must be of images in colours, 3 channels, got 1"
    refused(run(finetune, *begun, "--init", tmp_path / "resnet1", "--out", tmp_path / "c"), message)
    message = r"finetune\.py: checkpoint: model\.width must be 8 as in .*, got 16"
    refused(run(finetune, *begun, "--init", tmp_path / "resnet3", "--width", 16), message)


@pytest.mark.parametrize("model", MODELS)
def test_fine_tuning_replaces_the_head_where_the_classes_are_others(run, trained, tmp_path, model):
    path, _, data = trained[model]
    before, _ = load_scene_model(path)
    code, out, err = run(finetune, "--init", path, "--data", data, *STILL, "--out", tmp_path / "same")
    assert (code, err, "is new" in out) == (0, "", False)
    assert near(load_scene_model(tmp_path / "same")[0], before.state_dict(), "")
    write_voc(tmp_path / "one", count=6)
    options = ("--data", tmp_path / "one", "--classes", "stands", *STILL, "--out", tmp_path / "other")
    if model == "unet":  # the masks have two classes
        for file in (tmp_path / "one/SegmentationClass").iterdir():
            Image.fromarray(np.asarray(Image.open(file)) // 2).save(file)
    code, out, err = run(finetune, "--init", path, *options)
    assert (code, err) == (0, "")
    assert "the head is new, for 1 class\n" in out
    task, look = load_scene_model(tmp_path / "other")
    assert look.classes == ("stands",)
    kept = {name: tensor for name, tensor in before.state_dict().items() if "backbone" in name}
    assert near(task, kept, "")
    other = MODELS[model == "unet"]
    message = rf"finetune\.py: checkpoint: .* must hold the config of a {other} or of a ResNet, got .*"
    refused(run(finetune, "--model", other, "--init", path, "--data", data), message)


def test_a_picture_for_annotations_is_told_in_short(run, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "photo.png")
    code, _, err = run(pretrain, "--model", "unet", "--data", tmp_path / "photo.png", "--out", tmp_path / "a")
    assert code == 2 and "photo.png must be COCO's JSON, got UnicodeDecodeError" in err and len(err) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--model vnet",
            r"model: name must be one of gpt, llama, bert, resnet10, .*, unet, detector, got 'vnet'",
        ),
        ("--model unet --backbone vgg", r"model: backbone must be one of resnet10, .*, got 'vgg'"),
        ("--model unet --features 0", r"UNetConfig: width must be a positive integer, got 0"),
        ("--model detector --levels 5", r"DetectorConfig: levels must be at most 4, got 5"),
        ("--model unet --levels 3", r"unknown option --levels; see --help"),
        (
            "--model detector --data gone",
            r"scenes: 'gone' must be a folder of VOC's XML, .*, got no such path",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, tmp_path, arguments, message):
    refused(run(pretrain, *arguments.split(), "--out", tmp_path / "run"), rf"pretrain\.py: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", MODELS)
def test_the_help_is_a_page_of_its_own(run, model):
    for script in (pretrain, finetune):
        code, out, _ = run(script, "--model", model, "--help")
        assert code == 0
        assert all(len(line) <= 110 for line in out.splitlines())
        for part in ("\nmodel:\n", "\nscenes:\n", "--backbone", "[mnist_5k]", "\nexamples\n", f"[{model}]"):
            assert part in out
        assert ("--levels" in out) == (model == "detector")
