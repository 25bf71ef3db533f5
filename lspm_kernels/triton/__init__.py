"""Triton kernels and their launchers, one file per op; imported where a call first needs one."""

import importlib
import importlib.util
from collections.abc import Callable

import torch


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


_INSTALLED = _is_installed()  # asked once: torch.compile cannot trace the question


def kernel(name: str) -> Callable[..., None]:
    """The launcher of the kernel <op>_forward, <op>_backward or <op>_update, in the file <op>.py."""
    op, direction = name.rsplit("_", 1)

    def launch(*args):
        module = importlib.import_module(f"{__name__}.{op}")  # brings triton, so not before it is needed
        getattr(module, direction)(*args)

    return launch


def missing() -> str | None:
    """Why the Triton kernels cannot run here; None where they can."""
    if not _INSTALLED:
        return "triton, which is not installed"
    return None if torch.cuda.is_available() else "a CUDA GPU, which this machine lacks"
