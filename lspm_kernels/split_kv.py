"""The CUDA forward of attention where queries are few: one block for all heads that share keys, split-KV.

Without the first, a group of heads would read its keys as often as it has heads (on an H200, 32 heads over 8
took 6 times as long as torch); without the second, a step of decoding would occupy as many multiprocessors as
there are sequences and key heads (Dao et al., "Flash-Decoding", 2023).
"""

import functools
import math

import torch

from lspm_kernels import compiled

MOST_ROWS = 64  # queries of all heads that share a key head: what one block takes (csrc/attention.h)
_FEWEST_KEYS = 256  # of a block, so that joining its part costs little beside reading them
_MOST_PARTS = 128
_IDLE = 0.1  # of the multiprocessors' time, more than with the best number of parts


@functools.lru_cache(maxsize=1024)
def splits(blocks: int, rows: int, keys: int, multiprocessors: int) -> int:
    """Among how many the keys of each of `blocks` are divided; 0 where these are no calls for split-KV.

    Two blocks run on a multiprocessor at a time: the fewest parts whose last round leaves few of them idle,
    or as many as there can be where they are less than a round.
    """
    if rows > MOST_ROWS:
        return 0
    most, at_once = max(1, min(_MOST_PARTS, keys // _FEWEST_KEYS)), 2 * multiprocessors
    if blocks * most <= at_once:
        return most

    def busy(parts: int) -> float:
        rounds = blocks * parts / at_once
        return rounds / math.ceil(rounds)

    counts = range(1, most + 1)
    enough = (1 - _IDLE) * max(map(busy, counts))
    return next(parts for parts in counts if busy(parts) >= enough)


def attention_forward(
    q, k, v, bias, mask, slopes, sinks, out, lse, statistics, sequences, window, scalars
):  # fmt: skip
    """The CUDA kernel attention_forward with scratch for what its blocks find; arguments as the binding's."""
    _, H, queries, _ = q.shape
    batch, H_kv, keys, _ = k.shape
    if sequences is not None:
        query_starts, _, counts, _, queries, keys = sequences
        batch = counts.numel() if query_starts is None else query_starts.numel() - 1
    parts, group = 0, H // H_kv
    if bias is None and mask is None and slopes is None and not scalars[2]:
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
        parts = splits(batch * H_kv, queries * group, keys, multiprocessors)
    if parts == 1 and (group == 1 or keys < 2 * _FEWEST_KEYS):
        parts = 0  # nothing is shared or divided: a second kernel would not pay
    scratch = lse.new_empty(parts, lse.numel(), v.shape[-1] + 2) if parts else None
    compiled.cuda.attention_forward(
        q, k, v, bias, mask, slopes, sinks, out, lse, statistics, sequences, window, scalars, 0, scratch
    )
