"""Masks of tokens: how many, which, what stands for them, what a word is; and tokenizers that have masks."""

import json

import numpy as np
import pytest
import torch

from lspm_models.data.mask_tokenizer import MaskMarks, MaskTokenizer
from lspm_models.data.masking import MaskedTextConfig, MaskedTextData, Masking
from lspm_models.data.pretrained_tokenizer import byte_bpe
from lspm_models.data.tokenizer_folder import MARKS, word_piece
from lspm_models.data.tokenizers import ByteBpe, Characters, load_tokenizer, save_tokenizer
from lspm_models.data.tokens import Tokens

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "play",
    "##ing",
    "##s",
    "chess",
    ",",
    "12",
    "##3",
    "床",
]


def pieces():
    vocabulary = {token: index for index, token in enumerate(PIECES)}
    return MaskTokenizer(
        word_piece(vocabulary, {}, MARKS, "here"), MaskMarks(len(PIECES), 0, 2, 3, 4, 1), "here"
    )


@pytest.fixture(params=["bpe", "characters", "pieces"])
def tokenizer(request, bpe, characters):
    return {"bpe": lambda: MaskTokenizer.of(bpe), "characters": lambda: MaskTokenizer.of(characters)}.get(
        request.param, pieces
    )()


def rows(tokenizer, count=64, length=100):
    ids = np.random.default_rng(3).integers(tokenizer.vocabulary_size, size=(count, length))
    ids[0] = tokenizer.marks.separator  # a text of nothing that could be hidden
    return ids


def test_a_share_is_chosen_and_eight_of_ten_are_hidden(tokenizer):
    ids = rows(tokenizer, 400)
    inputs, targets = (
        t.numpy()[:, 1:-1] for t in Masking(tokenizer, 0.15).hide(ids, np.random.default_rng(0))
    )
    chosen, free = targets != -100, ~tokenizer.special[ids]
    assert not (chosen & ~free).any()
    assert (inputs[~chosen] == ids[~chosen]).all()
    assert (targets[chosen] == ids[chosen]).all()
    deviations = 4  # of a binomial
    for part, whole, share in (
        (chosen.sum(), free.sum(), 0.15),
        ((inputs == tokenizer.marks.mask)[chosen].sum(), chosen.sum(), 0.8),
        ((inputs == ids)[chosen].sum(), chosen.sum(), 0.1 + 0.1 / (~tokenizer.special).sum()),
    ):
        assert abs(part - share * whole) < deviations * (whole * share * (1 - share)) ** 0.5
    others = inputs[chosen & (inputs != tokenizer.marks.mask) & (inputs != ids)]
    assert set(others) <= set(np.flatnonzero(~tokenizer.special))
    assert len(set(others)) > 0.5 * (~tokenizer.special).sum()


def test_stands_between_the_marks_of_a_text(tokenizer):
    inputs, targets = Masking(tokenizer, 0.15).hide(rows(tokenizer), np.random.default_rng(0))
    assert inputs.shape == targets.shape == (64, 102)
    assert inputs.dtype == targets.dtype == torch.int64
    assert (inputs[:, 0] == tokenizer.marks.begin).all() and (
        inputs[:, -1] == tokenizer.marks.separator
    ).all()
    assert (targets[:, [0, -1]] == -100).all()


def test_a_text_hides_a_token_at_least(tokenizer):
    _, targets = Masking(tokenizer, 1e-9).hide(rows(tokenizer), np.random.default_rng(0))
    assert (targets != -100).sum(1).tolist() == [0] + [1] * 63


def test_the_same_rows_get_the_same_masks_in_other_batches(tokenizer):
    masking, ids = Masking(tokenizer, 0.15, whole_words=True), rows(tokenizer)
    whole, generator = masking.hide(ids, np.random.default_rng(5)), np.random.default_rng(5)
    parts = [masking.hide(part, generator) for part in np.split(ids, 8)]
    for a, b in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(a, b)


def test_whole_words_are_hidden_whole(tokenizer):
    ids = rows(tokenizer, 400)
    _, targets = Masking(tokenizer, 0.15, whole_words=True).hide(ids, np.random.default_rng(0))
    chosen = targets.numpy()[:, 1:-1] != -100
    joined = tokenizer.joins(ids)
    assert joined.any()
    assert (chosen[:, 1:] == chosen[:, :-1])[joined[:, 1:]].all()
    assert chosen.sum() == pytest.approx(0.15 * (~tokenizer.special[ids]).sum(), rel=0.1)
    _, targets = Masking(tokenizer, 0.15).hide(ids, np.random.default_rng(0))
    chosen = targets.numpy()[:, 1:-1] != -100
    assert not (chosen[:, 1:] == chosen[:, :-1])[joined[:, 1:]].all()


def words(tokenizer, text):
    """The words of a text, as ids are joined."""
    ids = np.array(tokenizer.encode(text))
    starts = np.flatnonzero(~tokenizer.joins(ids[None])[0])
    return [tokenizer.decode(part) for part in np.split(ids, starts[1:])]


def test_what_a_word_is(characters):
    assert words(pieces(), "playing chess, plays 123 床床") == [
        "playing", "chess", ",", "plays", "123", "床", "床",
    ]  # fmt: skip
    spelled = MaskTokenizer.of(Characters.train(["def été42(x): 床前\n the thé"], 99))
    assert words(spelled, "def été42(x): 床前") == [
        "def",
        " ",
        "été",
        "42",
        "(",
        "x",
        ")",
        ":",
        " ",
        "床",
        "前",
    ]
    by_bytes = MaskTokenizer.of(ByteBpe.train(["the then them"], 262))  # merges of "the" alone
    text = "if the_theme12 == éthé:\n 床前 x"
    assert words(by_bytes, text) == [
        "if", " the", "_", "theme", "12", " ", "=", "=", " ", "éthé", ":", "\n", " ", "床", "前", " ", "x",
    ]  # fmt: skip


def test_marks_are_behind_the_ids_of_ours(bpe, characters, tmp_path):
    for plain in (bpe, characters):
        tokenizer = MaskTokenizer.of(plain)
        assert tokenizer.marks.separator == tokenizer.end_of_text == plain.end_of_text
        assert tokenizer.vocabulary_size == plain.vocabulary_size + 3
        text = "def f(x):\n    return [MASK]  # [SEP] \ud83d"
        assert tokenizer.encode(text) == plain.encode(text)  # a mark's name is text
        assert tokenizer.decode(
            [*tokenizer.encode("def f"), *range(plain.end_of_text, plain.end_of_text + 4)]
        )
        assert tokenizer.decode(plain.encode("for x in y:\n    return")) == "for x in y:\n    return"
        save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert again.encode(text) == tokenizer.encode(text)
        assert (again.marks, again.special.tolist()) == (tokenizer.marks, tokenizer.special.tolist())


def test_a_masked_text(characters, bpe):
    marks = (tokenizer := MaskTokenizer.of(characters)).marks
    ids = [marks.begin, *characters.encode("a "), marks.mask, *characters.encode(" b"), marks.separator]
    assert tokenizer.encode_masked("a [MASK] b") == ids
    marks = (tokenizer := MaskTokenizer.of(bpe)).marks
    ids = [marks.begin, *bpe.encode("a"), marks.mask, marks.mask, *bpe.encode(" b "), marks.separator]
    assert tokenizer.encode_masked("a [MASK] [MASK] b ") == ids  # tokens begin with their space
    assert pieces().encode_masked("chess [MASK], Chess") == [2, 8, 4, 9, 8, 3]


def data(tokenizer, **options):
    ids = np.random.default_rng(1).integers(tokenizer.vocabulary_size, size=2000)
    return MaskedTextData(Tokens(ids, 1500, "here"), Masking(tokenizer, 0.15), 18, 4, **options)


def test_goes_on_exactly_where_it_was(tokenizer):
    whole, parts = data(tokenizer).training, data(tokenizer).training
    for _ in range(3):
        whole.next_batch(), parts.next_batch()
    again = data(tokenizer).training
    again.restore(json.loads(json.dumps(parts.state())))
    for _ in range(3):
        for a, b in zip(whole.next_batch(), again.next_batch(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(
        data(tokenizer, seed=1).training.next_batch()[0], data(tokenizer).training.next_batch()[0]
    )


def test_processes_draw_their_shares_from_one_state(tokenizer):
    first, second = (data(tokenizer, process=rank, processes=2).training for rank in range(2))
    a, b = first.next_batch(), second.next_batch()
    assert first.state() == second.state()
    assert not torch.equal(a[0], b[0]) and not torch.equal(a[1] == -100, b[1] == -100)


def test_validation_is_masked_the_same_way_every_time(tokenizer):
    source = data(tokenizer, validation_batches=3)
    first = list(source.validation())
    source.training.next_batch()
    assert len(first) == 3
    for (a, b), (c, d) in zip(first, data(tokenizer, validation_batches=3, seed=9).validation(), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    hidden = torch.cat([targets[targets != -100] for _, targets in first])
    ids = np.random.default_rng(1).integers(tokenizer.vocabulary_size, size=2000)[:1500]
    most = np.bincount(ids[~tokenizer.special[ids]]).argmax()
    assert source.unigram_accuracy() == pytest.approx((hidden == most).double().mean().item())
    without = MaskedTextData(Tokens(np.arange(99) % 5, 99, "here"), Masking(tokenizer, 0.15), 18, 4)
    assert (list(without.validation()), without.unigram_accuracy()) == ([], None)


def test_refuses(bpe):
    tokenizer = MaskTokenizer.of(bpe)
    with pytest.raises(ValueError, match=r"^data: masked must be greater than 0 and less than 1, got 1.0$"):
        MaskedTextConfig(masked=1.0)
    with pytest.raises(
        ValueError, match=r"^model: context must be at least 3, a token between two marks, got 2$"
    ):
        MaskedTextData(Tokens(np.zeros(9), 9, ""), Masking(tokenizer, 0.15), 2, 1)
    with pytest.raises(ValueError, match=r"^tokenizer: ids of here must be below the model's 12, got 12$"):
        MaskTokenizer(pieces()._tokenizer, MaskMarks(12, 0, 2, 3, 4, 1), "here")
    bare = byte_bpe({"a": 0}, [], digits=False, where="here")
    bare.decoder = None
    with pytest.raises(ValueError, match=r"^tokenizer: model of here must be WordPiece, .*, got BPE$"):
        MaskTokenizer(bare, MaskMarks(9, 1, 2, 3, 4), "here")
    with pytest.raises(ValueError, match=r"^prompt: model must continue texts, got one that fills masks$"):
        tokenizer.prompt("a")
