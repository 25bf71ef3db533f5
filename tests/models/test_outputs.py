"""Text that comes token by token is the text of all tokens, and no character comes before it is certain."""

import io

import pytest

from lspm_models.outputs import TextStream, Transcript


def decode(tokens):
    """Every token is a byte, as at worst in a byte-level tokenizer."""
    return bytes(tokens).decode(errors="replace")


def parts(data, **arguments):
    stream = TextStream(decode, **arguments)
    return [stream.push(token) for token in data] + [stream.finish()]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"abc", ["a", "b", "c", ""]),
        ("né".encode(), ["n", "", "é", ""]),
        ("床前".encode(), ["", "", "床", "", "", "前", ""]),
        ("a🙂b".encode(), ["a", "", "", "", "🙂", "b", ""]),
        ("床".encode()[:2], ["", "", "\ufffd"]),
        (b"\xff\xffa", ["", "", "\ufffd\ufffda", ""]),
        (b"\xe5a", ["", "\ufffda", ""]),
    ],
    ids=str,
)
def test_characters_of_several_bytes_come_whole(data, expected):
    assert parts(data) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", ".", "one"),
        ("aaab", "aab", "a"),  # a beginning of stop within a beginning of stop
        ("def f():\n\ndef", "\n\n", "def f():"),
        ("a\nb\n", "\n\n", "a\nb\n"),  # held back, and then free
        ("none", "x", "none"),
        ("诗。完", "完", "诗。"),
        ("ab", "ab", ""),
    ],
)
def test_text_ends_before_the_stop_text(text, stop, expected):
    stream = TextStream(decode, stop=stop)
    shown = ""
    for token in text.encode():
        shown += stream.push(token)
        assert expected.startswith(shown)
    assert stream.stopped == (stop in text)
    assert shown + stream.finish() == expected
    assert stream.push(ord("z")) == ("" if stream.stopped else "z")


def test_stop_may_come_within_one_token():
    stream = TextStream(lambda tokens: "".join("left<end>right" for _ in tokens), stop="<end>")
    assert stream.push(0) == "left"
    assert stream.stopped


def test_transcript_shows_the_first_sequence_at_once_and_the_others_at_the_end():
    file = io.StringIO()
    transcript = Transcript(file, "1+", 2, decode, stop="!")
    assert file.getvalue() == ""
    assert not transcript.push(0, ord("1"))
    assert file.getvalue() == "--- 1 of 2 ---\n1+1"
    assert not transcript.push(1, ord("2"))
    assert not transcript.push(0, "é".encode()[0])
    assert transcript.push(1, ord("!"))
    assert file.getvalue() == "--- 1 of 2 ---\n1+1"
    transcript.finish()
    assert file.getvalue() == "--- 1 of 2 ---\n1+1\ufffd\n--- 2 of 2 ---\n1+2\n"


def test_transcript_of_one_has_no_heading():
    file = io.StringIO()
    transcript = Transcript(file, "a", 1, decode)
    transcript.push(0, ord("b"))
    transcript.finish()
    assert file.getvalue() == "ab\n"


def test_refuses_an_empty_stop():
    with pytest.raises(ValueError, match=r"^TextStream: stop must be at least one character, got ''$"):
        TextStream(decode, stop="")
