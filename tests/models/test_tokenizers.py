"""Tokenizers: what goes in comes out."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.pretrained_tokenizer import PretrainedTokenizer
from lspm_models.data.tokenizers import (
    ByteBpe,
    Characters,
    load_tokenizer,
    save_tokenizer,
    without_surrogates,
)

MARKS = {"vocabulary_size": 300, "end_of_text": 299, "stops": [299]}
ANY_TEXT = st.text(st.characters(exclude_categories=[]))  # surrogates too


@given(ANY_TEXT)
def test_bpe_gives_any_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == without_surrogates(text)
    assert bpe.end_of_text not in ids
    assert bpe.decode([*ids, bpe.end_of_text]) == without_surrogates(text)
    np.testing.assert_array_equal(bpe.encode_batch([text, "a"])[0], ids)


@given(ANY_TEXT)
def test_characters_give_known_text_back_and_mark_the_rest(sample, characters, text):
    known = set(sample)
    ids = characters.encode(text)
    expected = "".join(c if c in known else "\ufffd" for c in without_surrogates(text))
    assert characters.decode(ids) == expected
    np.testing.assert_array_equal(characters.encode_batch([text])[0], ids)


def test_a_surrogate_pair_is_its_character_and_a_lone_one_is_marked():
    assert without_surrogates("a\ud83d\ude00b") == "a\U0001f600b"
    assert without_surrogates("\ude00a\ud83d") == "\ufffda\ufffd"


@given(ANY_TEXT)
@example("a\ud83d\ude00b \ud800")
def test_spans_are_those_of_the_text_that_is_encoded(bpe, characters, text):
    shown = without_surrogates(text)
    ours = MaskTokenizer.of(bpe), PretrainedTokenizer.from_json(bpe.to_json() | {"marks": MARKS})
    for tokenizer in (bpe, characters, *ours):
        ((ids, spans),) = tokenizer.encode_with_spans([text])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert "".join(shown[first:last] for first, last in dict.fromkeys(map(tuple, spans))) == shown


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_without_surrogates_stays_itself(text):
    assert without_surrogates(text) is text


def test_sizes_and_special_ids(sample, bpe, characters):
    assert (bpe.vocabulary_size, bpe.end_of_text) == (300, 299)
    assert "<|endoftext|>" == bpe.decode(bpe.encode("<|endoftext|>"))
    assert characters.vocabulary_size == len(set(sample)) + 2
    assert characters.encode("é") == [0]
    assert Characters.train(["aabbbc"], 4).encode("abc") == [2, 1, 0]  # the two most frequent


def test_a_space_that_ends_a_prompt_goes_to_the_next_token(bpe, characters):
    text, first = bpe.healed("def ")
    assert text == "def"
    assert first == [index for index in range(bpe.end_of_text) if bpe.decode([index]).startswith(" ")]
    assert bpe.healed("x  ")[0] == "x "
    assert [bpe.healed(text) for text in ("def", "", " ", "a\n")] == [
        (t, []) for t in ("def", "", " ", "a\n")
    ]
    assert characters.healed("def ") == ("def ", [])


def test_saved_tokenizers_come_back(tmp_path, sample, bpe, characters):
    for tokenizer in (bpe, characters):
        save_tokenizer(tokenizer, tmp_path / "t.json")
        again = load_tokenizer(tmp_path / "t.json")
        assert again.encode(sample) == tokenizer.encode(sample)
        assert again.vocabulary_size == tokenizer.vocabulary_size
        assert json.loads((tmp_path / "t.json").read_text())["kind"] == tokenizer.kind


def test_tokenizer_errors(tmp_path, bpe):
    with pytest.raises(ValueError, match=r"^tokenizer: vocabulary_size must be at least 257 .*, got 256$"):
        ByteBpe.train(["a"], 256)
    with pytest.raises(ValueError, match=r"^tokenizer: vocabulary_size must be at least 3 .*, got 2$"):
        Characters.train(["a"], 2)
    with pytest.raises(ValueError, match=r"^decode: ids must lie in 0\.\.299, got 300$"):
        bpe.decode([1, 300])
    with pytest.raises(ValueError, match=r"must be a tokenizer file, got no such file$"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"kind": "sentencepiece"}')
    with pytest.raises(ValueError, match=r"must be a tokenizer file, got KeyError"):
        load_tokenizer(tmp_path / "bad.json")
