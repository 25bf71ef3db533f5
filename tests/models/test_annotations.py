"""Pascal VOC's and COCO's annotations: boxes to the pixel, masks, and what is damaged."""

import json
import math

import numpy as np
import pytest

from lspm_models.data.annotations import Annotated, mask_of, read_coco, read_voc

OBJECT = """<object><name>{}</name><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def voc(name, *objects, size="<size><width>20</width><height>10</height></size>"):
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


def test_voc_counts_pixels_from_one(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(
        voc("a.jpg", OBJECT.format("dog", 0, 1, 1, 20, 10), OBJECT.format("cat", 1, 3, 4, 3, 4))
    )
    (tmp_path / "Annotations" / "b.xml").write_text(voc("../../b.jpg"))
    found = read_voc(tmp_path)
    assert (found.classes, found.skipped) == (("cat", "dog"), {})
    assert [image.path for image in found.images] == [
        tmp_path / "JPEGImages" / name for name in ("a.jpg", "b.jpg")
    ]
    assert found.images[0].boxes.tolist() == [[0, 0, 20, 10, 1], [2, 3, 3, 4, 0]]
    assert found.images[0].crowd.tolist() == [False, True]
    assert found.images[0].size == (20, 10)
    assert found.images[1].boxes.shape == (0, 5)
    assert read_voc(tmp_path, ("dog",)).images[0].boxes[:, 4].tolist() == [0]


def test_what_is_damaged_in_voc_is_named(tmp_path):
    whole = OBJECT.format("dog", 0, 1, 1, 5, 5)
    files = {
        "a": voc("a.jpg", OBJECT.format("dog", 0, "x", 1, 5, 5), OBJECT.format("dog", 0, 9, 9, 2, 2), whole),
        "b": voc("b.jpg", whole)[:-9],
        "c": voc("c.jpg", whole, size=""),
        "d": "<!DOCTYPE x [<!ENTITY e 'eeee'>]>" + voc("d.jpg", "<object><name>&e;</name></object>"),
        "e": voc("e.jpg", OBJECT.format("dog", 0, 1, 1, 99, 5)),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.xml").write_text(text)
    found = read_voc(tmp_path)
    assert [image.path.name for image in found.images] == ["a.jpg", "e.jpg"]
    assert found.images[0].boxes.tolist() == [[0, 0, 5, 5, 0]]
    assert found.images[1].boxes.tolist() == [[0, 0, 20, 5, 0]]
    assert list(found.skipped) == [
        f"{tmp_path}/a.xml: object 1",
        f"{tmp_path}/a.xml: object 2",
        *(f"{tmp_path}/{name}.xml" for name in "bcd"),
    ]
    assert found.skipped[f"{tmp_path}/c.xml"] == "has no size/width"
    assert found.skipped[f"{tmp_path}/d.xml"] == "defines entities"
    with pytest.raises(ValueError, match=r"^annotations: .*/none must hold XML files, got none$"):
        read_voc(tmp_path / "none")


def packed(lengths):
    """COCO's compression, as its rleToString writes it."""
    text = ""
    for index, length in enumerate(lengths):
        value, more = length - (lengths[index - 2] if index > 2 else 0), True
        while more:
            part, value = value & 31, value >> 5
            more = value != -1 if part & 16 else value != 0
            text += chr(48 + (part | 32 if more else part))
    return text


def coco(tmp_path, annotations, width=6):
    content = {
        "categories": [{"id": 7, "name": "owl"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 50, "file_name": "a.jpg", "width": width, "height": 4},
            {"id": 51, "file_name": "b.jpg", "width": 6, "height": 4},
        ],
        "annotations": annotations,
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    return read_coco(tmp_path / "c.json", tmp_path / "images")


def test_coco(tmp_path):
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    common = {"image_id": 50, "iscrowd": 0}
    found = coco(
        tmp_path,
        [
            {"id": 1, "category_id": 7, "bbox": [0, 0, 2.5, 3], "segmentation": square, **common},
            {"id": 2, "category_id": 3, "bbox": [4, 1, 9, 9], **common, "iscrowd": 1},
            {"id": 3, "category_id": 9, "bbox": [0, 0, 2, 2], **common},
            {"id": 4, "category_id": 3, "bbox": [0, 0, 0, 2], **common},
            {"id": 5, "category_id": 3, **common},
        ],
    )
    assert found.classes == ("cat", "owl")
    assert found.images[0].path == tmp_path / "images" / "a.jpg"
    assert found.images[0].boxes.tolist() == [[0, 0, 2.5, 3, 1], [4, 1, 6, 4, 0]]
    assert found.images[0].crowd.tolist() == [False, True]
    assert found.images[1].boxes.shape == (0, 5)
    names = [f"{tmp_path}/c.json: annotation {number}" for number in (3, 4, 5)]
    assert list(found.skipped) == names
    assert "must have an area" in found.skipped[names[1]]
    mask = mask_of(found.images[0])
    assert mask[:3, :3].tolist() == [[2] * 3] * 3  # a polygon's corners are in it
    assert mask.sum() == 18


def test_sizes_of_coco_may_be_whole_floats(tmp_path):
    found = coco(tmp_path, [], width=6.0)
    assert mask_of(found.images[0]).shape == (4, 6)
    for width in (6.5, math.nan):
        with pytest.raises(ValueError, match=rf"must be COCO's JSON, got ValueError\('width is {width}'\)$"):
            coco(tmp_path, [], width=width)


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths_go_down_the_columns(compressed):
    inside = np.random.default_rng(0).random((40, 30)) < 0.5
    inside[:, 7:20] = True  # a run longer than one character tells
    column = inside.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], column, [1 - column[-1]]))))
    lengths = np.diff(np.concatenate(([0], edges))).tolist()
    code = {"size": [40, 30], "counts": packed(lengths) if compressed else lengths}
    image = Annotated("x", (30, 40), np.array([[0, 0, 30, 40, 4]], np.float32), [code], np.zeros(1, bool))
    assert np.array_equal(mask_of(image), inside * 5)
    code["size"] = [40, 31]
    with pytest.raises(ValueError, match=r"^annotations: run lengths must fill 40 x 31 pixels, got 1200$"):
        mask_of(image)
    code["size"] = [30, 40]
    with pytest.raises(ValueError, match=r"a mask must have the shape \(40, 30\), got \(30, 40\)$"):
        mask_of(image)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ({"size": [40, 30]}, r"must have a size and counts, got KeyError\('counts'\)"),
        ({"size": "ab", "counts": [1200]}, r"must have a size and counts, got ValueError"),
        ({"size": [40.0, 30.0], "counts": [1300.0]}, r"must fill 40 x 30 pixels, got 1300"),
        ({"size": None, "counts": [1200]}, r"must have a size and counts, got TypeError"),
        ({"size": [40, 30], "counts": [1300, -100]}, r"must fill 40 x 30 pixels, got 1200"),
        ({"size": [40, 30], "counts": [10**15]}, r"must fill 40 x 30 pixels, got 1000000000000000"),
    ],
)
def test_run_lengths_that_are_none(code, message):
    image = Annotated("x", (30, 40), np.array([[0, 0, 30, 40, 4]], np.float32), [code], np.zeros(1, bool))
    with pytest.raises(ValueError, match="^annotations: run lengths " + message):
        mask_of(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bbox": [math.nan] * 4}, "a box must be finite, got (nan, nan, nan, nan)"),
        ({"bbox": [0, 0, math.inf, 2]}, "a box must be finite, got (0.0, 0.0, inf, 2.0)"),
        ({"category_id": 9}, "has no or an unknown 9"),
        (
            {"iscrowd": [1]},
            "int() argument must be a string, a bytes-like object or a real number, not 'list'",
        ),
        ({"segmentation": [[1, 2]]}, "a polygon must have three points or more, all of them finite"),
        (
            {"segmentation": [[math.nan, 1, 2, 1, 2, 2]]},
            "a polygon must have three points or more, all of them finite",
        ),
    ],
)
def test_a_damaged_object_of_coco_is_named_and_the_others_kept(tmp_path, options, message):
    whole = {"id": 1, "image_id": 50, "category_id": 7, "bbox": [0, 0, 2, 2], "iscrowd": "0"}
    found = coco(tmp_path, [{**whole, "id": 4, **options}, whole])
    assert found.skipped == {f"{tmp_path}/c.json: annotation 4": message}
    assert found.images[0].boxes.tolist() == [[0, 0, 2, 2, 1]]
    assert found.images[0].crowd.tolist() == [False]


def test_names_and_encodings_that_are_none_in_voc(tmp_path):
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>"
    size = "<size><width>6</width><height>4</height></size>"
    objects = "".join(f"<object>{name}{box}</object>" for name in ("", "<name> </name>", "<name>cat</name>"))
    (tmp_path / "a.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (tmp_path / "b.xml").write_text("<?xml version='1.0' encoding='none'?><annotation/>")
    found = read_voc(tmp_path)
    assert (found.classes, len(found.images)) == (("cat",), 1)
    names = [f"{tmp_path}/a.xml: object 1", f"{tmp_path}/a.xml: object 2", f"{tmp_path}/b.xml"]
    assert found.skipped == dict(zip(names, ["has no name"] * 2 + ["unknown encoding: none"], strict=True))


def test_coco_after_a_byte_order_mark(tmp_path):
    coco(tmp_path, [])
    path = tmp_path / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_coco(path, tmp_path).classes == ("cat", "owl")


WRONG = {
    "null for a list": '{"categories": [], "images": [], "annotations": null}',
    "a name that is none": '{"categories": [{"id": 1, "name": 5}], "images": [], "annotations": []}',
    "one id twice": '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "images": [],'
    ' "annotations": []}',
    "two images of one id": '{"categories": [], "images": [{"id": 1, "file_name": "a", "width": 1,'
    ' "height": 1}, {"id": 1, "file_name": "b", "width": 1, "height": 1}], "annotations": []}',
    "no file name": '{"categories": [], "images": [{"id": 1, "file_name": 5, "width": 1, "height": 1}],'
    ' "annotations": []}',
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"images": []}', '{"categories": 1, "images": 2, "annotations": 3}', *WRONG.values()],
    ids=["empty", "list", "part", "numbers", *WRONG],
)
def test_a_file_that_is_no_coco(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"^annotations: .*c\.json must be COCO's JSON, got "):
        read_coco(tmp_path / "c.json", tmp_path)
    with pytest.raises(ValueError, match=r"^annotations: .*none\.json must be readable, got No such file"):
        read_coco(tmp_path / "none.json", tmp_path)
