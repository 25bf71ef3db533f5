"""What the backends of attention refuse, of (q, k, v, (B, H), bias); packed sequences are (1, H, rows, D)."""

import torch

from lspm_kernels.dispatch import Limit

_SHARED = 129 * 1024  # bytes of a block in the backward of 256 dims: csrc/cuda/attention_backward.cu


def _shared(q) -> int:
    return torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin


_PLACES = Limit(  # which have 32 bits
    "fewer than 2 ** 30 queries and keys",
    lambda q, k, *_: max(q.shape[2], k.shape[2]) < 2**30,
    lambda q, k, *_: max(q.shape[2], k.shape[2]),
)
_GRID = Limit(
    "at most 65535 batches and heads",
    lambda q, k, v, heads, _: max(heads) <= 65535,
    lambda q, k, v, heads, _: f"{heads[0]} and {heads[1]}",
)
_MEMORY = Limit(
    "head dims to 128, or 129 KiB of shared memory to a block",
    lambda q, k, v, *_: max(q.shape[-1], v.shape[-1]) <= 128 or _shared(q) >= _SHARED,
    lambda q, k, v, *_: f"{max(q.shape[-1], v.shape[-1])} and {_shared(q) // 1024} KiB",
)
_NO_DBIAS = Limit(
    "a bias without a gradient",
    lambda q, k, v, heads, bias: bias is None or not (bias.requires_grad and torch.is_grad_enabled()),
    lambda *_: "one that requires it",
)

CUDA = (_PLACES, _GRID, _MEMORY, _NO_DBIAS)
TRITON = (_PLACES,)
