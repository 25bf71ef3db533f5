"""Token files, the split, and blocks of tokens."""

import json

import numpy as np
import pytest
import torch

from lspm_models.data.corpus import PIECE, open_corpus
from lspm_models.data.text import TextBlocks, TextConfig, TextData, prepare_text
from lspm_models.data.tokenizers import Characters
from lspm_models.data.tokens import Tokens, tokens_for


def corpus_of(tmp_path, texts):
    for index, text in enumerate(texts):
        (tmp_path / f"{index:03}.txt").write_text(text, encoding="utf-8")
    return open_corpus([tmp_path])


def test_whole_documents_are_set_aside(tmp_path):
    texts = [f"{index:03}" for index in range(40)]
    corpus, tokenizer = corpus_of(tmp_path, texts), Characters.train(["0123456789"], 100)
    tokens = tokens_for(corpus, tokenizer, tmp_path / "tokens", validation=0.1, split="auto")
    ids = tokens.ids.tolist()
    assert (len(ids), tokens.boundary) == (160, 144)  # 3 characters and end of text each
    text = "".join(" " if i == tokenizer.end_of_text else tokenizer.decode([i]) for i in ids)
    assert text.split()[-4:] == ["009", "019", "029", "039"]
    assert sorted(text.split()) == texts
    assert tokens.ids.dtype == np.uint16


def test_the_tail_of_a_single_file_is_set_aside(tmp_path, characters):
    corpus = corpus_of(tmp_path, ["return " * 100])
    tokens = tokens_for(corpus, characters, tmp_path / "t", validation=0.25, split="auto")
    assert (len(tokens.ids), tokens.boundary) == (701, 701 - 175)
    with pytest.raises(ValueError, match=r"^corpus: split=document must have at least 4 documents .* got 1$"):
        tokens_for(corpus, characters, tmp_path / "t", validation=0.25, split="document")
    corpus = corpus_of(tmp_path, ["return "] * 4)
    tokens = tokens_for(corpus, characters, tmp_path / "t", validation=0.25, split="document")
    assert (len(tokens.ids), tokens.boundary) == (32, 24)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = Characters("".join(map(chr, range(0x10000, 0x20000))))
    tokens = tokens_for(
        corpus_of(tmp_path, ["\U0001ffff"]), tokenizer, tmp_path / "t", validation=0, split="tail"
    )
    assert (tokens.ids.dtype, tokens.ids.tolist()) == (np.uint32, [65536, 65537])


def test_token_files_are_made_once_for_each_content(tmp_path, sample, bpe, characters):
    corpus_of(tmp_path, [sample])
    folder = tmp_path / "t"
    lines = []

    def make(tokenizer, validation=0.1):
        return tokens_for(
            open_corpus([tmp_path / "000.txt"]),
            tokenizer,
            folder,
            validation=validation,
            split="auto",
            report=lines.append,
        )

    first = make(bpe)
    assert make(bpe).fingerprint == first.fingerprint
    assert len(lines) == 1
    others = [make(characters), make(bpe, 0.2)]
    (tmp_path / "000.txt").write_text(sample + "x", encoding="utf-8")
    others.append(make(bpe))
    assert (
        len({first.fingerprint, *(other.fingerprint for other in others)}) == 4 == len(list(folder.iterdir()))
    )
    assert bpe.decode(first.ids[:-1]) == sample


def test_a_stream_of_pieces_equals_the_whole(tmp_path, characters):
    text = "a + b " * (3 * PIECE)
    (tmp_path / "a.txt").write_text(text)
    corpus = open_corpus([tmp_path / "a.txt"])
    tokens = tokens_for(corpus, characters, tmp_path / "t", validation=0, split="auto")
    assert tokens.ids.tolist() == [*characters.encode(text), characters.end_of_text]


def test_blocks_are_consecutive_and_the_state_brings_them_back():
    blocks = TextBlocks(np.arange(1000, dtype=np.uint16), 8, 4, seed=3)
    inputs, targets = blocks.next_batch()
    assert (inputs.shape, inputs.dtype) == ((4, 8), torch.int64)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
    state = json.loads(json.dumps(blocks.state()))
    following = [blocks.next_batch()[0] for _ in range(3)]
    other = TextBlocks(np.arange(1000, dtype=np.uint16), 8, 4, seed=99)
    other.restore(state)
    assert all(torch.equal(other.next_batch()[0], batch) for batch in following)


def test_every_place_can_be_drawn():
    blocks = TextBlocks(np.arange(11), 8, 64, seed=0)
    assert set(blocks.next_batch()[0][:, 0].tolist()) == {0, 1, 2}


def test_processes_share_one_stream():
    ids = np.arange(1000)
    shares = [TextBlocks(ids, 8, 2, seed=0, process=rank, processes=2) for rank in range(2)]
    drawn = torch.cat([share.next_batch()[0] for share in shares])
    assert torch.equal(drawn, TextBlocks(ids, 8, 4, seed=0).next_batch()[0])
    assert shares[0].state() == shares[1].state()


def test_validation_blocks_do_not_move_or_overlap():
    data = TextData(Tokens(np.arange(1000), 500, "x"), 10, 4, validation_batches=3)
    batches = list(data.validation())
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert starts.tolist() == list(dict.fromkeys(starts.tolist()))
    assert (len(batches), len(starts), int(starts.min()), int(starts.max())) == (3, 12, 500, 980)
    assert torch.equal(starts, torch.cat([inputs[:, 0] for inputs, _ in data.validation()]))
    assert sum(len(inputs) for inputs, _ in TextData(Tokens(np.arange(52), 20, "x"), 10, 4).validation()) == 3


def test_a_corpus_that_is_too_short():
    def data(count, boundary):
        return TextData(Tokens(np.arange(count), boundary, "x"), 8, 2)

    message = (
        r"^corpus: text must hold at least 18 tokens \(one training and one validation block of 8\), got 17$"
    )
    with pytest.raises(ValueError, match=message):
        data(17, 16)
    assert len(list(data(18, 17).validation())) == 1  # the boundary moves to make room for a block
    assert data(100, 1).training.next_batch()[0].shape == (2, 8)  # either way
    with pytest.raises(
        ValueError, match=r"^corpus: text must hold at least 9 tokens \(one block of 8\), got 8$"
    ):
        data(8, 8)
    assert list(data(9, 9).validation()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": ()}, "data: corpus must name a file, a folder or a corpus, got nothing"),
        ({"corpus": ("a", "")}, "data: corpus must name a file, a folder or a corpus, got nothing"),
        ({"max_bytes": 0}, "data: max_bytes must be at least 1, got 0"),
        ({"tokenizer_sample": 0}, "data: tokenizer_sample must be at least 1, got 0"),
        ({"validation": 1.0}, "data: validation must be at least 0 and less than 1, got 1.0"),
        ({"tokenizer": "words"}, "data: tokenizer must be one of bpe, character, got 'words'"),
        ({"split": "half"}, "data: split must be one of auto, document, tail, got 'half'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        TextConfig(**options)
    assert str(error.value) == message


def test_a_run_keeps_its_tokenizer(tmp_path, sample):
    (tmp_path / "a.txt").write_text(sample, encoding="utf-8")
    config = TextConfig(corpus=[str(tmp_path / "a.txt")], vocabulary_size=280)
    run = tmp_path / "run"
    run.mkdir()
    lines = []
    tokenizer, tokens = prepare_text(config, run, lines.append)
    assert tokenizer.vocabulary_size == 280
    assert [line.split()[0] for line in lines] == ["corpus", "tokenizer", "encoded"]
    before = (run / "tokenizer.json").stat().st_mtime_ns
    again = prepare_text(config, run)
    assert (run / "tokenizer.json").stat().st_mtime_ns == before
    assert again[1].fingerprint == tokens.fingerprint
