"""JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path


def read_object(path: Path) -> dict:
    """Returns the object in a JSON file.

    Raises:
        ValueError: there is no such file, or it is not one object; the message names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"json: {path} must be there, got no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json: {path} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"json: {path} must be an object, got {type(content).__name__}")
    return content
