"""Chinese couplets of five characters a line, and how many of them keep this form."""

from __future__ import annotations

from typing import Any, TextIO

from lspm_models.data.corpus import COUPLET
from lspm_models.data.tokenizers import Tokenizer
from lspm_models.generate import generate
from lspm_models.outputs import TextStream
from lspm_models.tasks.language_modelling import LanguageModelling


def write_couplets(
    file: TextIO,
    task: LanguageModelling,
    tokenizer: Tokenizer,
    first: str,
    couplets: int,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> None:
    """Writes poems with an empty line after each, and the share of them that keeps the form.

    Args:
        file: where they are written.
        task, tokenizer: trained on poems with a couplet to a line, such as those of the corpus `tang`.
        first: what each poem begins with, such as its first line.
        couplets: of a poem.
        max_new_tokens, sampling: see generate.
    """
    streams = [TextStream(tokenizer.decode) for _ in range(sampling["sequences"])]
    poems = [first] * len(streams)

    def push(sequence: int, token: int) -> bool:
        poems[sequence] += streams[sequence].push(token)
        return poems[sequence].count("\n") >= couplets

    beginning = [tokenizer.end_of_text, *tokenizer.encode(first)]  # what the poem before ends with
    generate(task, beginning, max_new_tokens=max_new_tokens, stream=push, **sampling)
    poems = [poem + stream.finish() for poem, stream in zip(poems, streams, strict=True)]
    for poem in poems:
        file.write(poem.removesuffix("\n") + "\n\n")
    kept = sum(keeps_form(poem, couplets) for poem in poems)
    form = "five characters, a comma, five characters and a full stop"
    file.write(f"{kept} of {len(poems)} keep the form: {couplets} x {form}\n")


def keeps_form(poem: str, couplets: int) -> bool:
    """Whether a poem is so many couplets, each in a line."""
    lines = poem.splitlines()
    return len(lines) == couplets and all(map(COUPLET.fullmatch, lines))
