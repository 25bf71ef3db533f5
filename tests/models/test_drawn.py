"""Annotated images as scenes: exact where nothing is resized, in one format, and what is damaged left out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scenes import NAMES, OBJECT, bars, write_coco, write_voc

from lspm_models.data import image_files
from lspm_models.data.annotations import Annotated, Annotations, read_coco, read_voc
from lspm_models.data.drawn import DrawnScenes, agreeing, read_photo
from lspm_models.data.image_config import ImageFormat, load_format
from lspm_models.data.image_files import Dataset
from lspm_models.data.scene_config import SceneConfig
from lspm_models.data.scenes import SceneData, prepare_scenes


def annotated(folder, size=(40, 20), boxes=((10, 4, 20, 16, 1),), crowd=(False,), **options):
    """One image, blue but for its boxes, with an annotation for it."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 2] = 200
    for x0, y0, x1, y1, _ in boxes:
        pixels[y0:y1, x0:x1] = 255, 0, 0
    path = folder / f"{len(list(folder.iterdir()))}.png"
    Image.fromarray(pixels).save(path)
    outlines = [
        [np.array([(x0, y0), (x1 - 1, y0), (x1 - 1, y1 - 1), (x0, y1 - 1)])] for x0, y0, x1, y1, _ in boxes
    ]
    return Annotated(path, size, np.array(boxes, np.float32), outlines, np.array(crowd), **options)


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_what_was_drawn_comes_back(tmp_path, kind):
    folder = tmp_path / "data"
    if kind == "voc":
        written, found = write_voc(folder), read_voc(folder)
    else:
        written, found = write_coco(folder), read_coco(folder / "all.json", folder)
    assert (found.classes, found.skipped) == (NAMES, {})
    images = agreeing(found, masks=True)
    scenes = DrawnScenes(images, 48, 2, masks=True)
    for number, (pixels, mask, boxes) in enumerate(written):
        # VOC's files are sorted by name, and so is 10 before 2; here there are ten, 0 to 9.
        for ours, theirs in zip(scenes.scene(number), (pixels, mask, boxes), strict=True):
            assert np.array_equal(ours, theirs)


def test_an_image_keeps_its_shape_and_what_is_beside_it_does_not_count(tmp_path):
    image = annotated(tmp_path)
    pixels, mask, boxes = DrawnScenes([image], 20, 2, masks=True).scene(0)
    assert boxes.tolist() == [[5, 2, 10, 8, 1]]
    assert (pixels[:, 10:] == 127).all()
    assert (mask[10:] == 255).all()
    assert (mask[2:8, 5:10] == 2).all()
    assert (mask[:10] > 0).sum() == 30
    assert pixels[:, 5, 7].tolist() == [255, 0, 0]
    assert DrawnScenes([image], 20, 2, masks=False).scene(0)[1] is None
    scenes = DrawnScenes([image], 20, 2, masks=True)
    ((_, targets),) = SceneData(scenes, scenes, "mask", 1, set_aside=1).all_held_out()
    assert (targets[0, 10:] == -100).all()
    assert targets[0, :10].tolist() == mask[:10].tolist()


def test_what_nobody_must_find_has_a_label_below_minus_one(tmp_path):
    image = annotated(tmp_path, boxes=((1, 1, 9, 9, 0), (10, 4, 20, 16, 1)), crowd=(False, True))
    boxes = DrawnScenes([image], 40, 2, masks=False).scene(0)[2]
    assert boxes[:, 4].tolist() == [0, -3]
    assert image.boxes[:, 4].tolist() == [0, 1]


def test_training_takes_each_once_an_epoch_and_mirrors_half(tmp_path):
    images = [annotated(tmp_path, boxes=((x, 4, x + 8, 16, 1),)) for x in range(0, 32, 2)]
    scenes = DrawnScenes(images, 40, 2, masks=True, seed=3, flip=True)
    orders = []
    for epoch in range(4):
        order = []
        for number in range(16 * epoch, 16 * epoch + 16):
            pixels, mask, ((x0, _, x1, _, _),) = scenes.scene(number)
            assert (mask[:20].any(0).nonzero()[0][[0, -1]] == (x0, x1 - 1)).all()
            assert ((pixels[0] == 255).any(0).nonzero()[0][[0, -1]] == (x0, x1 - 1)).all()
            order.append(min(int(x0), int(40 - x1)))
        orders.append(order)
        assert sorted(order) == sorted(min(x, 32 - x) for x in range(0, 32, 2))
    assert orders[0] != orders[1]
    plain = DrawnScenes(images, 40, 2, masks=True, seed=3)
    same = [np.array_equal(scenes.scene(n)[0], plain.scene(n)[0]) for n in range(64)]
    assert 16 < sum(same) < 48
    again = DrawnScenes(images, 40, 2, masks=True, seed=3, flip=True)
    assert all(map(np.array_equal, scenes.scene(70), again.scene(70)))
    prints = {DrawnScenes(images, 40, 2, masks=True, seed=seed).fingerprint() for seed in (3, 3, 4)}
    assert len(prints) == 2
    images[0].boxes[0, 0] += 1
    assert plain.fingerprint() not in prints


def test_a_damaged_image_is_named_once_and_left_out(tmp_path):
    images = [annotated(tmp_path, boxes=((2 * x, 4, 2 * x + 8, 16, 1),)) for x in range(6)]
    content = images[2].path.read_bytes()
    images[2].path.write_bytes(content[: len(content) * 2 // 3])
    lines = []
    training = DrawnScenes(images, 40, 2, masks=False, seed=0, report=lines.append)
    lefts = [int(training.scene(number)[2][0, 0]) for number in range(24)]
    assert set(lefts) == {0, 2, 6, 8, 10}
    assert len(lines) == 1
    assert lines[0].startswith(f"skipped    {images[2].path}: ")
    assert lines[0].endswith(" (image 1 left out)")
    held_out = DrawnScenes(images, 40, 2, masks=False)
    assert [held_out.scene(number) is None for number in range(6)] == [False, False, True, *[False] * 3]
    data = SceneData(training, held_out, "boxes", 3, validation_batches=9, set_aside=6)
    assert [len(batch) for batch, _ in data.all_held_out()] == [2, 3]
    for image in images:
        image.path.write_bytes(content[:60])
    alone = DrawnScenes(images, 40, 2, masks=False, seed=0)
    with pytest.raises(ValueError, match=r"^images: one must be readable, got none of 6; "):
        alone.scene(0)


def test_a_mask_that_does_not_fit_is_left_out(tmp_path):
    path, lines = tmp_path / "mask.png", []
    for mask, why in (
        (np.full((20, 40), 9, np.uint8), "its mask must have values to 2, one for each class, got 9"),
        (np.full((20, 40), 255, np.uint8), "its mask must have a pixel that counts, got 255 everywhere"),
        (np.zeros((20, 39), np.uint8), "its mask must be 40 x 20 P or L, got 39 x 20 L"),
        (np.zeros((20, 40, 3), np.uint8), "its mask must be 40 x 20 P or L, got 40 x 20 RGB"),
    ):
        Image.fromarray(mask).save(path)
        image = annotated(tmp_path, mask=path)
        assert DrawnScenes([image], 40, 2, masks=True, report=lines.append).scene(0) is None
        assert why in lines[-1]
    image.mask, image.outlines = None, [{"size": [20, 40], "counts": [5]}]
    assert DrawnScenes([image], 40, 2, masks=True, report=lines.append).scene(0) is None
    assert "run lengths must fill 20 x 40 pixels, got 5" in lines[-1]


def test_missing_images_are_left_out_and_a_wrong_size_is_an_error(tmp_path):
    images = [annotated(tmp_path) for _ in range(3)]
    images[0].path.unlink()
    images[1].path.write_text("no image")
    found = Annotations(images, NAMES)
    assert agreeing(found, masks=True) == images[2:]
    assert list(found.skipped.values()) == ["no such file", "cannot identify image file"]
    images[2].size = (20, 40)
    with pytest.raises(ValueError) as error:
        agreeing(found, masks=False)
    assert str(error.value) == (
        f"annotations: {images[2].path} must be as large as its annotation says, 20 x 40, got 40 x 20"
    )
    with pytest.raises(ValueError, match=r"^annotations: an image must be usable, got none: .*no such file"):
        agreeing(Annotations(images[:1], NAMES), masks=False)
    images[2].size, images[2].outlines = (40, 20), [[]]
    with pytest.raises(ValueError, match=r"^annotations: objects must have outlines or masks .*boxes only$"):
        agreeing(Annotations(images[2:], NAMES), masks=True)
    other = annotated(tmp_path)
    found = Annotations([images[2], other], NAMES)
    assert agreeing(found, masks=True) == [other]
    assert found.skipped == {str(images[2].path): "has boxes without masks"}
    many = tuple(map(str, range(255)))
    assert agreeing(Annotations([other], many), masks=False) == [other]
    assert agreeing(Annotations([other], many[1:]), masks=True) == [other]
    with pytest.raises(ValueError, match=r"^annotations: classes must be fewer than 255 for masks, got 255$"):
        agreeing(Annotations([other], many), masks=True)


def test_a_turned_photo_may_be_annotated_either_way(tmp_path):
    image = annotated(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = tmp_path / "turned.png"
    with Image.open(image.path) as file:
        file.save(path, exif=exif)
    for size in ((40, 20), (20, 40)):
        turned = Annotated(path, size, image.boxes, image.outlines, image.crowd)
        assert agreeing(Annotations([turned], NAMES), masks=False) == [turned]
        assert read_photo(path, size).size == size
    assert read_photo(path).size == (20, 40)


def test_a_run_gets_its_scenes(tmp_path, monkeypatch):
    write_voc(tmp_path / "data")
    (tmp_path / "data/JPEGImages/3.png").unlink()
    (tmp_path / "data/Annotations/4.xml").write_text("<annotation>")
    lines = []
    config = SceneConfig(str(tmp_path / "data"), size=48, validation=0.25)
    like = ImageFormat(("x",), 3, 7, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    training, held_out, count, look = prepare_scenes(config, "boxes", tmp_path, lines.append, like)
    assert (len(training), len(held_out), count) == (6, 2, 2)
    assert look == load_format(tmp_path / "images.json")
    assert (look.classes, look.size, look.mean) == (NAMES, 48, (0.1, 0.2, 0.3))
    assert lines[0].startswith("skipped    2 that cannot be used: ")
    assert "/4.xml (" in lines[0]
    assert "/3.png (no such file)" in lines[0]
    assert lines[1].startswith("scenes     data: 6 to train on, 2 to validate on, ")
    named = SceneConfig(str(tmp_path / "data"), classes=("lies",))
    with pytest.raises(
        ValueError, match=r"^scenes: classes of .* must be those of .*, lies, stands, got lies$"
    ):
        prepare_scenes(named, "boxes", tmp_path)
    few = SceneConfig(str(tmp_path / "data"), validation=0.01)
    with pytest.raises(ValueError, match=r"^scenes: validation must leave images to train on .*0\.01 of 8$"):
        prepare_scenes(few, "boxes", tmp_path)
    with pytest.raises(ValueError, match=r"^scenes: 'gone' must be a folder of VOC's XML, .*no such path$"):
        prepare_scenes(SceneConfig("gone"), "boxes", tmp_path)
    with pytest.raises(
        ValueError, match=r"^data: classes must be absent but with a folder of VOC's XML, got"
    ):
        prepare_scenes(SceneConfig(str(tmp_path / "images.json"), classes=("a",)), "boxes", tmp_path)


def test_objects_of_voc_may_be_too_hard(tmp_path):
    write_voc(tmp_path / "data", count=2)
    path = tmp_path / "data/Annotations/0.xml"
    path.write_text(
        path.read_text().replace("</annotation>", OBJECT.format("lies", 1, 1, 1, 9, 9) + "</annotation>")
    )
    images = agreeing(read_voc(tmp_path / "data"), masks=False)
    assert DrawnScenes(images, 48, 2, masks=False).scene(0)[2][-1].tolist() == [0, 0, 9, 9, -2]


def test_pasted_scenes_are_of_other_images_when_held_out(tmp_path, monkeypatch):
    images = bars()
    parts = (images.subset(np.flatnonzero(images.labels == label)) for label in range(2))
    dataset = Dataset("bars", *parts, NAMES)
    monkeypatch.setitem(image_files.NAMED, "mnist_5k", lambda: dataset)
    lines, config = [], SceneConfig(size=48, most=1)
    training, held_out, count, look = prepare_scenes(config, "mask", tmp_path, lines.append, seed=5)
    assert count == 1000
    for scenes, label in ((training, 0), (held_out, 1)):
        assert {int(scenes.scene(number)[2][0, 4]) for number in range(9)} == {label}
    assert lines == ["scenes     bars on textures: 6 to train with, 6 to validate with, 2 classes, 48 x 48"]
    other = prepare_scenes(config, "mask", tmp_path, seed=6)
    assert training.fingerprint() != other[0].fingerprint()
    assert held_out.fingerprint() == other[1].fingerprint()
    data = SceneData(training, held_out, "mask", 2, look=look, set_aside=count)
    pictures, targets = data.next_batch()
    expected = torch.from_numpy(training.scene(1)[0]) / 127.5 - 1
    torch.testing.assert_close(pictures[1], expected)
    assert torch.equal(targets[1], torch.from_numpy(training.scene(1)[1]).long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 31}, "size must be at least 32, got 31"),
        ({"size": 4097}, "size must be at most 4096, got 4097"),
        ({"classes": ("dog", "cat", "dog")}, "classes must be different ones, got dog cat dog"),
        ({"most": 10**9}, "most must be at most 1000, got 1000000000"),
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"validation": 0.0}, "validation must be between 0 and 1, got 0.0"),
        ({"validation": 1.0}, "validation must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        SceneConfig(**options)
    assert str(error.value) == "data: " + message


@pytest.mark.parametrize("masks", [True, False])
def test_annotations_without_objects(tmp_path, masks):
    write_voc(tmp_path / "data", count=3)
    (tmp_path / "data" / "SegmentationClass").rename(tmp_path / "masks")
    (tmp_path / "data" / "Annotations" / "0.xml").write_text("<annotation/>")
    message = (
        r"^annotations: objects of owl must be there to learn from, got none: .*0\.xml \(has no size/width\)$"
    )
    with pytest.raises(ValueError, match=message):
        agreeing(read_voc(tmp_path / "data", ("owl",)), masks=masks)
    (tmp_path / "masks").rename(tmp_path / "data" / "SegmentationClass")  # tell enough without boxes
    assert len(agreeing(read_voc(tmp_path / "data", ("owl",)), masks=True)) == 2


def test_no_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    write_voc(tmp_path / "data", count=3)
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(ValueError, match=r"^scenes: '' must be a folder of VOC's XML, .*, got no such path$"):
        prepare_scenes(SceneConfig(data=""), "boxes", tmp_path)


def test_polygons_change_the_fingerprint(tmp_path):
    write_coco(tmp_path / "data", count=3)
    content = json.loads((tmp_path / "data/all.json").read_text())
    prints = set()
    for shift in (0, 1):
        content["annotations"][0]["segmentation"] = [[0, 0, 5 + shift, 0, 5, 5]]
        (tmp_path / "data/all.json").write_text(json.dumps(content))
        images = agreeing(read_coco(tmp_path / "data/all.json", tmp_path / "data"), masks=True)
        prints.add(DrawnScenes(images, 48, 2, masks=True).fingerprint())
    assert len(prints) == 2
