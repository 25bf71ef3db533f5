"""Images in training: the split, batches that go on where they stopped, and what is said of damage."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import LABELS, PIXELS, write_idx

from lspm_models.data.augmentation import Augmentation
from lspm_models.data.image_config import ImageConfig, ImageFormat, load_format
from lspm_models.data.image_formats import Images
from lspm_models.data.images import ImageData, prepare_images, set_aside

LOOK = ImageFormat(("a", "b", "c"), 1, 6, (0.5,), (0.25,))


def test_a_share_of_every_class_is_set_aside():
    labels = np.random.default_rng(0).permutation([0] * 10 + [1] * 5 + [2] * 20)
    training, held_out = set_aside(Images(labels, np.zeros((35, 1, 1, 1), np.uint8)), 0.2)
    assert np.bincount(held_out.labels).tolist() == [2, 1, 4]
    assert np.bincount(training.labels).tolist() == [8, 4, 16]
    assert len(set_aside(training, 0.0)[1]) == 0


def data(batch_size=4, **options):
    chosen = {
        name: options.pop(name) for name in ("crop", "flip", "jitter", "mixup", "cutmix") if name in options
    }
    images = Images(LABELS, PIXELS)
    return ImageData(images, images.subset(np.arange(6)), LOOK, ImageConfig(**chosen), batch_size, **options)


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    batches = data(batch_size=3).training
    drawn = torch.cat([batches.next_batch()[0] for _ in range(8)])
    pixels = LOOK.shown(drawn).mul(255).round().to(torch.uint8).numpy()
    orders = [
        [int((PIXELS == image).all((1, 2, 3)).argmax()) for image in half]
        for half in (pixels[:12], pixels[12:])
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1] != list(range(12))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn[0, 0], (torch.from_numpy(PIXELS[orders[0][0], 0]) / 255 - 0.5) / 0.25)


def test_the_state_brings_back_the_batches_to_the_bit():
    options = {"batch_size": 5, "crop": 2, "flip": True, "jitter": 0.3, "mixup": 0.5, "cutmix": 0.5}
    batches = data(**options).training
    batches.next_batch()
    state, generator = json.loads(json.dumps(batches.state())), torch.get_rng_state()
    following = [batches.next_batch() for _ in range(4)]
    other = data(**options, seed=9).training
    other.restore(state)
    torch.set_rng_state(generator)
    for images, targets in following:
        again = other.next_batch()
        assert torch.equal(images, again[0])
        assert torch.equal(targets, again[1])
    assert not torch.equal(following[0][0], data(**options, seed=9).training.next_batch()[0])


def test_processes_share_one_row_of_images():
    shares = [data(batch_size=2, process=rank, processes=2).training for rank in range(2)]
    one = data(batch_size=4).training
    for _ in range(4):
        parts = [share.next_batch() for share in shares]
        whole = one.next_batch()
        assert all(torch.equal(torch.cat(pair), part) for *pair, part in zip(*parts, whole, strict=True))
    assert shares[0].state() == shares[1].state() == one.state()


def test_augmentation_varies_each_image_on_its_own():
    pixels = np.tile(PIXELS[:1], (64, 1, 1, 1))
    images = Images(np.zeros(64, np.int64), pixels)
    torch.manual_seed(3)

    def distinct(**options):
        made = ImageData(images, images, LOOK, ImageConfig(**options), 64).training.next_batch()[0]
        return made, {tuple(image.flatten().tolist()) for image in made}

    plain, one = distinct()
    assert len(one) == 1
    _, two = distinct(flip=True)
    assert two == {*one, tuple(plain[0].flip(2).flatten().tolist())}
    _, places = distinct(crop=1)
    assert len(places) == 9
    assert len(distinct(jitter=0.4)[1]) > 50
    _, targets = data(batch_size=12, mixup=1.0).training.next_batch()
    assert targets.shape == (12, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    assert ((targets > 0) & (targets < 1)).any()
    assert data(batch_size=12, cutmix=1.0).training.next_batch()[1].shape == (12, 3)


def test_augmentation_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    data().training.next_batch()
    message = (
        r"^images: flip needs torchvision, of the release that fits torch .*; install it with: pip install"
    )
    with pytest.raises(ValueError, match=message):
        data(flip=True)


def test_validation_is_the_same_every_time():
    source = data(batch_size=2, validation_batches=2)
    first, second = list(source.validation()), list(source.validation())
    assert [labels.tolist() for _, labels in first] == [[0, 1], [0, 2]]  # images 0, 1, 3 and 5
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert [len(labels) for _, labels in source.all_held_out()] == [2, 2, 2]


def test_a_run_keeps_its_format(tmp_path):
    write_idx(tmp_path / "d")
    lines = []
    config = ImageConfig(data=str(tmp_path / "d"), validation=0.25)
    training, held_out, look = prepare_images(config, tmp_path, lines.append)
    assert (len(training), len(held_out)) == (9, 3)
    assert lines == ["images     d: 9 to train on, 3 to validate on, 3 classes, 6 x 6 grey"]
    assert look.mean[0] == pytest.approx(training.pixels.mean() / 255, abs=1e-4)
    assert look.deviation[0] == pytest.approx(training.pixels.std() / 255, abs=1e-4)
    assert load_format(tmp_path / "images.json") == look
    torch.testing.assert_close(
        look.shown(look.normalised(torch.full((1, 1, 2, 2), 51))), torch.full((1, 1, 2, 2), 0.2)
    )
    write_idx(tmp_path / "d", labels=LABELS + 1)
    with pytest.raises(
        ValueError, match=r"^images: classes of .* must be those of .*, 0, 1, 2, got 0, 1, 2, 3$"
    ):
        prepare_images(config, tmp_path)
    (tmp_path / "images.json").write_text("[]")
    with pytest.raises(ValueError, match=r"^images: .*\.json must be the format of a run's images, got "):
        prepare_images(config, tmp_path)


def test_damage_is_reported_with_a_count(tmp_path):
    path = write_idx(tmp_path / "d", packed=False)
    path.write_bytes(path.read_bytes()[:-40])
    lines = []
    prepare_images(ImageConfig(data=str(path)), tmp_path, lines.append)
    assert lines[1] == f"skipped    2 images that cannot be read: {path} (shorter than it says)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "data: size must be at least 1, got 0"),
        ({"size": 4097}, "data: size must be at most 4096, got 4097"),
        ({"crop": -1}, "data: crop must be at least 0, got -1"),
        ({"channels": 2}, "data: channels must be 1 or 3, got 2"),
        ({"validation": 1.0}, "data: validation must be at least 0 and less than 1, got 1.0"),
        ({"label_smoothing": -0.1}, "data: label_smoothing must be at least 0 and less than 1, got -0.1"),
        ({"mixup": float("nan")}, "data: mixup must be 0 or greater, got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        ImageConfig(**options)
    assert str(error.value) == message


def test_a_crop_leaves_something_of_every_image():
    Augmentation(ImageConfig(crop=5), 6, 3)
    with pytest.raises(ValueError, match=r"^data: crop must be less than the 6 pixels of a side, got 6$"):
        Augmentation(ImageConfig(crop=6), 6, 3)


def test_a_folder_with_a_broken_image_trains_without_it(tmp_path):
    for label, value in (("a", 50), ("b", 200)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (9, 7), (value, index, 0)).save(tmp_path / "photos" / label / f"{index}.png")
    for name in ("a/0.png", "b/3.png"):
        (tmp_path / "photos" / name).write_bytes(b"\x89PNG")
    lines, config = [], ImageConfig(data=str(tmp_path / "photos"), size=6, validation=0.25)
    training, held_out, look = prepare_images(config, tmp_path)
    assert (len(training), len(held_out), look.channels, look.size) == (6, 2, 3, 6)
    source = ImageData(training, held_out, look, config, 4, report=lines.append)
    for _ in range(3):
        images, labels = source.training.next_batch()
        assert images.shape == (4, 3, 6, 6)
        bright = look.shown(images)[:, 0].mean((1, 2)) > 0.5
        assert bright.long().tolist() == labels.tolist()
    assert [len(labels) for _, labels in source.all_held_out()] == [1]
    names = [line.split("photos/")[1].split(":")[0] for line in lines]
    assert sorted(names) == ["a/0.png", "b/3.png"]
