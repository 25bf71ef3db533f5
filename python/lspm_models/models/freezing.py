"""Which parts of a model do not train: by patterns of their names, or by stages from its input."""

import difflib
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn


def matching(what: str, patterns: Sequence[str], names: Collection[str]) -> list[str]:
    """Returns the names that match any of the patterns, in their order.

    Args:
        what: begins the message: the argument, and what it must match.
        patterns: as of fnmatch; case counts.
        names: of modules or parameters.

    Raises:
        ValueError: a pattern matches no name; the message has the nearest ones.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            # One name stands for those of all blocks.
            kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
            near = difflib.get_close_matches(pattern.replace("*", ""), kinds, 3, cutoff=0)
            raise ValueError(f"{what}, got {pattern!r}, which matches none; nearest: {', '.join(near)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes gradients from the parameters whose names match, or the names of modules that they are in.

    A head that is tied to the table of embeddings is frozen with it.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    inside = {name: _prefixes(name) for name, _ in model.named_parameters()}
    known = dict.fromkeys(prefix for prefixes in inside.values() for prefix in prefixes)
    frozen = set(matching("freeze: patterns must match parameters or modules", patterns, known))
    for name, parameter in model.named_parameters():
        if frozen.intersection(inside[name]):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: patterns must leave parameters to train, got {' '.join(patterns)}")


def freeze_stages(model: nn.Module, stages: int) -> list[nn.Module]:
    """Takes gradients from the stem and the first of a model's stages(), and returns their modules.

    Raises:
        ValueError: the model has fewer.
    """
    parts = model.stages()
    if not 0 <= stages <= len(parts):
        rule = f"0 to {len(parts)}, the stem or the embeddings and {len(parts) - 1} more"
        raise ValueError(f"freeze: stages must be {rule}, got {stages}")
    frozen = [module for stage in parts[:stages] for module in stage]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
