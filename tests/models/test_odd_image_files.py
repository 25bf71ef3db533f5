"""Image files that other programs write otherwise: 16 bits, byte order marks, numbers that are none."""

import numpy as np
import pytest
from PIL import Image, features
from tiny_images import write_idx

from lspm_models.data.drawn import read_photo
from lspm_models.data.image_files import decode, open_images

RAMP = np.linspace(0, 65535, 600).reshape(20, 30)
HEADER = "label,a,b,c,d\n"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_greys(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16)).save(path)
    expected = (RAMP / 256).astype(np.uint8)
    assert np.array_equal(np.asarray(read_photo(path)), np.repeat(expected[..., None], 3, axis=2))
    for channels in (1, 3):
        pixels = decode(path, channels, 20).astype(int)
        assert np.abs(pixels - expected[:, 5:25]).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"^its pixels must have 8 or 16 bits, got 32 \(mode [IF]\)$"):
        decode(tmp_path / "a.tif", 1, 8)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_without_its_pixels(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.avif")
    content = (tmp_path / "a.avif").read_bytes()
    pixels = content.index(b"mdat") + 4
    blank = content[:pixels] + bytes(len(content) - pixels)
    (tmp_path / "a.jpg").write_bytes(blank)  # servers send it under any name
    with pytest.raises(ValueError, match=r"^Failed to decode "):  # PIL's is a RuntimeError
        decode(tmp_path / "a.jpg", 3, 8)


def read(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_images(str(path))


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\n\n", b"\r\n"], ids=["mark", "lines", "windows"])
def test_csv_after_a_byte_order_mark_or_empty_lines(tmp_path, before):
    for rows in (b"3,7,8,9,10\n1,0,0,0,0\n", b"3,7,8,9,10\n\n1,0,0,0,0"):
        dataset = read(tmp_path, before + HEADER.encode() + rows)
        assert dataset.training.labels.tolist() == [3, 1]
        assert dataset.training.pixels.ravel().tolist() == [7, 8, 9, 10, 0, 0, 0, 0]
    assert read(tmp_path, before + b"7,8,9,10,3\n").training.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("1,0.5,0,0,0", "0.5 is no whole number"),
        ("1.5,0,0,0,0", "1.5 is no whole number"),
        ("1000000000,0,0,0,0", "a pixel outside 0 to 255 or a label outside 0 to 65535"),
        ("1e30,0,0,0,0", "a pixel outside 0 to 255 or a label outside 0 to 65535"),
        ("inf,0,0,0,0", "cannot convert float infinity to integer"),
    ],
)
def test_numbers_that_are_no_pixel_or_label(tmp_path, row, why):
    dataset = read(tmp_path, f"{HEADER}2,7,7,7,7\n{row}\n")
    assert dataset.training.labels.tolist() == [2]
    assert dataset.skipped == {f"{tmp_path}/a.csv:3": (why, 1)}


@pytest.mark.parametrize("header", ["", "digit,a,b,c,d\n"])
def test_labels_that_stand_first_without_a_name(tmp_path, header):
    message = (
        r"a\.csv must have its labels last, or below a header with label or .*, got 0 last in every row$"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path, header + "5,0,7,8,0\n3,0,9,9,0\n")
    assert read(tmp_path, HEADER + "5,0,7,8,0\n3,0,9,9,0\n").training.labels.tolist() == [5, 3]
    assert read(tmp_path, header + "5,0,7,8,0\n").training.labels.tolist() == [
        0
    ]  # of one row nothing is known


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_table(tmp_path, content):
    with pytest.raises(
        ValueError, match=r"^images: rows of .* must have the pixels of a square, .* got 0 col"
    ):
        read(tmp_path, content)


def test_sizes_beyond_all_arrays_in_idx(tmp_path):
    path = write_idx(tmp_path / "d", packed=False)
    content = bytearray(path.read_bytes())
    content[8:16] = b"\xff" * 8  # of the sides; their product wraps around in 64 bits
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^images: .* must hold images, got none \(.*: shorter than it says\)$"
    ):
        open_images(str(path))


def test_idx_of_neither_grey_nor_colour(tmp_path):
    path = write_idx(tmp_path / "d", packed=False)
    content = bytearray(path.read_bytes())
    content[3:16] = b"\4" + b"".join(size.to_bytes(4, "big") for size in (12, 2, 3, 6))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^images: .* must hold images of 1 or 3 channels, got 2$"):
        open_images(str(path))


def test_names_of_classes_that_are_no_text(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
    (tmp_path / "batches.meta.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"^images: .*batches\.meta\.txt must be text in UTF-8, got "):
        open_images(str(tmp_path))
