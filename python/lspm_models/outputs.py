"""From what a model gives to what a person reads."""

from collections.abc import Callable, Sequence
from typing import TextIO


class TextStream:
    """Text as its tokens arrive, each character once, when it is certain.

    A token may end within a character of several bytes, or within the text to stop at: what it leaves open is
    held back. All parts that push and finish gave, joined, are the text up to `stop`.

    Args:
        decode: the tokenizer's, from ids to text; it replaces unfinished bytes by U+FFFD.
        stop: the text ends before this; it is not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: str | None = None):
        if stop == "":
            raise ValueError("TextStream: stop must be at least one character, got ''")
        self.decode, self.stop = decode, stop
        self.stopped = False
        self._tokens: list[int] = []  # not yet text
        self._held = ""  # text, but perhaps the beginning of stop

    def push(self, token: int) -> str:
        """The text that is certain now. After the stop text, `stopped` is true and nothing follows."""
        self._tokens.append(token)
        text = self.decode(self._tokens)
        if self.stopped or text.endswith("\ufffd"):
            return ""
        self._tokens.clear()
        return self._release(text)

    def finish(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        text = self._release(self.decode(self._tokens)) + self._held
        self._tokens, self._held = [], ""
        return text

    def _release(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if self.stop is None:
            return text
        if self.stop in text:
            self.stopped = True
            return text[: text.index(self.stop)]
        for size in range(min(len(self.stop) - 1, len(text)), 0, -1):
            if text.endswith(self.stop[:size]):
                self._held = text[-size:]
                return text[:-size]
        return text


class Transcript:
    """Several continuations of a text on a terminal: the first as its tokens arrive, the others at the end.

    Args:
        file: where it is written.
        prompt: stands before each.
        sequences: how many; more than one get headings.
        decode, stop: see TextStream.
    """

    def __init__(
        self,
        file: TextIO,
        prompt: str,
        sequences: int,
        decode: Callable[[Sequence[int]], str],
        stop: str | None = None,
    ):
        self.file = file
        self._streams = [TextStream(decode, stop) for _ in range(sequences)]
        headings = [f"--- {i + 1} of {sequences} ---\n" for i in range(sequences)] if sequences > 1 else [""]
        self._unwritten = [heading + prompt for heading in headings]

    def push(self, sequence: int, token: int) -> bool:
        """Adds a token to a sequence; true where that sequence has met its stop text."""
        self._unwritten[sequence] += self._streams[sequence].push(token)
        if sequence == 0:
            self.file.write(self._unwritten[0])
            self.file.flush()
            self._unwritten[0] = ""
        return self._streams[sequence].stopped

    def finish(self) -> None:
        """Writes what is left."""
        for stream, rest in zip(self._streams, self._unwritten, strict=True):
            self.file.write(rest + stream.finish() + "\n")
        self.file.flush()
