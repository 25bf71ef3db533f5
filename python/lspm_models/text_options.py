"""The options of generate.py."""

from __future__ import annotations

from dataclasses import dataclass

from lspm_models.options import option


@dataclass(frozen=True)
class Text:
    """What to continue, and how far."""

    prompt: str | None = option(
        None, "text to continue; - reads standard input", default="begin a new text", metavar="TEXT"
    )
    chat: str | None = option(
        None, "message to answer, by a model that chats", default="continue a text", metavar="TEXT"
    )
    system: str | None = option(
        None, "what the model shall be, before --chat", default="the template's", metavar="TEXT"
    )
    tokens: int = option(200, "most tokens to add")
    sequences: int = option(1, "continuations to make")
    couplets: int | None = option(
        None,
        "end after so many couplets of five characters a line; says how many keep the form",
        default="off",
    )
    stop: str | None = option(None, "end before this text", default="where the model ends", metavar="TEXT")

    def __post_init__(self) -> None:
        if self.chat is not None and self.prompt is not None:
            raise ValueError(f"generate: prompt must be absent beside chat, got {self.prompt!r}")
        if self.chat is None and self.system is not None:
            raise ValueError(f"generate: system must be beside chat, got {self.system!r} alone")
        if self.couplets is not None and self.couplets < 1:
            raise ValueError(f"generate: couplets must be at least 1, got {self.couplets}")
        for name in ("chat", "stop"):
            if self.couplets is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"generate: {name} must be absent beside couplets, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = option(0.8, "below 1, probable tokens come more often than the model says")
    top_k: int | None = option(None, "choose among so many of the most probable tokens", default="all")
    top_p: float | None = option(None, "choose among the most probable that sum to this", default="1")
    min_p: float | None = option(None, "of at least so much of the most probable one's", default="0")
    repetition_penalty: float = option(1.0, "above 1, tokens of the text so far come less often")
    seed: int | None = option(None, "the same seed gives the same text", default="a new one each time")
