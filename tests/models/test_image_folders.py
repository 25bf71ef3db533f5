"""Folders of images as they come: names in other encodings, classes named train, classes without images."""

import os

import pytest
from PIL import Image
from tiny_images import write_idx

from lspm_models.data.image_config import ImageConfig, load_format
from lspm_models.data.image_files import decode, open_images
from lspm_models.data.images import prepare_images


def draw(folder, count=2):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(folder / f"{index}.png")


def prepared(data, folder, **options):
    lines = []
    folder.mkdir()
    training, _, look = prepare_images(ImageConfig(str(data), size=8, **options), folder, lines.append)
    return training, look, lines


def test_names_that_are_no_utf_8(tmp_path):
    for name in ("caf\udce9", "tea"):
        draw(tmp_path / "x" / name)
    os.rename(tmp_path / "x" / "tea" / "1.png", tmp_path / "x" / "tea" / "\udcff.png")
    training, look, _ = prepared(tmp_path / "x", tmp_path / "run")
    assert look.classes == load_format(tmp_path / "run" / "images.json").classes == (r"caf\udce9", "tea")
    assert (len(training), len(training.fingerprint())) == (4, 16)


def test_a_name_of_a_class_may_be_two_words(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073) + b"\1" + bytes(3072))
    (tmp_path / "batches.meta.txt").write_text("fire truck\r\nsports car\n\n")
    assert open_images(str(tmp_path)).classes == ("fire truck", "sports car")


def test_a_class_may_be_named_train(tmp_path):
    for name in ("bus", "train"):
        draw(tmp_path / name)
    assert open_images(str(tmp_path)).classes == ("bus", "train")


def test_a_test_part_alone_is_no_class(tmp_path):
    draw(tmp_path / "test" / "cat")
    with pytest.raises(ValueError, match=r"must hold a folder train or training beside test, got none$"):
        open_images(str(tmp_path))


def test_images_without_folders_for_their_classes(tmp_path):
    draw(tmp_path / "train")
    draw(tmp_path / "test")
    with pytest.raises(ValueError, match=r"train must hold a folder of images for each class, or IDX, "):
        open_images(str(tmp_path))


def test_no_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    draw(tmp_path / "cat")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^images: '' must be a file, a folder or one of .*, got no such "):
        open_images("")
    assert open_images(".").classes == ("cat",)


def test_a_share_that_sets_nothing_aside_is_told(tmp_path):
    for name in ("cat", "owl"):
        draw(tmp_path / "x" / name, 9)
    for share, rest in ((0.1, " (of no class a share of 0.1 is an image)"), (0.0, ""), (0.2, "")):
        line = prepared(tmp_path / "x", tmp_path / f"{share}", validation=share)[2][0]
        count = 2 if share == 0.2 else 0
        assert line == (
            f"images     x: {18 - count} to train on, {count} to validate on{rest}, 2 classes, 8 x 8 colour"
        )


def test_classes_without_images_are_told(tmp_path):
    for name in "abcdef":
        (tmp_path / "x" / name).mkdir(parents=True)
    draw(tmp_path / "x" / "d")
    _, look, lines = prepared(tmp_path / "x", tmp_path / "run")
    assert lines[1:] == ["empty      5 classes without an image to train on: a, b, c and 2 more"]
    assert len(look.classes) == 6
    write_idx(tmp_path / "idx")
    assert len(prepared(tmp_path / "idx", tmp_path / "full")[2]) == 1


@pytest.mark.filterwarnings("error")
def test_transparency_in_a_palette(tmp_path):
    image = Image.new("P", (8, 8), 3)
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert decode(tmp_path / "a.png", 3, 1).ravel().tolist() == [10, 20, 30]
