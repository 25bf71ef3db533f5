"""The cache of what the suite compiles, which threads of one build and pytest's workers fill together."""

import fcntl
import os


def made(path, make):
    """The file that `make(unfinished)` writes, made once for all threads and processes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = path.with_name(f"unfinished.{path.name}")
                make(unfinished)
                os.replace(unfinished, path)
    return path
