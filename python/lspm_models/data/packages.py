"""Packages that carry data: found without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(module: str, install: str, what: str) -> Path:
    """Returns the folder of an installed package without importing it.

    Args:
        module: its name.
        install: the command that installs it, for the message.
        what: how the message begins.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{what}: {module} must be an installed package, got none; install it with: {install}"
        )
    return Path(spec.submodule_search_locations[0])
