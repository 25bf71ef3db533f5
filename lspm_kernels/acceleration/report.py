"""What accelerate did to a model."""

import re
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What accelerate did to the modules of a model; those that it knows nothing about are in neither.

    Attributes:
        replaced: path of a module -> what it is now.
        left: path of a module -> why it is as it was.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)} modules", *_lines(self.replaced)]
        lines += [f"left as they are: {len(self.left)} modules", *_lines(self.left)]
        return "\n".join(lines)


def _lines(entries: dict[str, str]) -> list[str]:
    """One line for paths that differ in their numbers alone and share what is said of them."""
    counts = Counter((re.sub(r"\b\d+\b", "*", path) or "(model)", what) for path, what in entries.items())
    width = max((len(path) for path, _ in counts), default=0)
    return [f"  {path:{width}s}  {count:4d} x  {what}" for (path, what), count in counts.items()]
