"""accelerate's options, for the rules."""

from dataclasses import dataclass

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Options:
    """See accelerate."""

    inference: bool = False
    dtype: torch.dtype | None = None
