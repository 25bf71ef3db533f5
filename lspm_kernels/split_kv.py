"""The CUDA forward of attention, which divides keys among blocks where queries are few (split-KV).

Without that, a step of decoding would occupy as many multiprocessors as there are sequences and key heads
(Dao et al., "Flash-Decoding", 2023).
"""

import torch

from lspm_kernels import compiled

_MOST_ROWS = 64  # queries of all heads that share a key head: what one block takes (csrc/attention.h)
_FEWEST_KEYS = 256  # of a block, so that joining its part costs little beside reading them


def splits(blocks: int, rows: int, keys: int, multiprocessors: int) -> int:
    """Among how many the keys of each of `blocks` are divided, for two blocks to a multiprocessor in all."""
    if rows > _MOST_ROWS:
        return 1
    return max(1, min(2 * multiprocessors // max(blocks, 1), keys // _FEWEST_KEYS))


def attention_forward(
    q, k, v, bias, mask, slopes, sinks, out, lse, statistics, sequences, window, scalars
):  # fmt: skip
    """The CUDA kernel attention_forward with scratch for what its blocks find; arguments as the binding's."""
    _, H, queries, _ = q.shape
    batch, H_kv, keys, _ = k.shape
    if sequences is not None:
        query_starts, _, counts, _, queries, keys = sequences
        batch = counts.numel() if query_starts is None else query_starts.numel() - 1
    parts = 1
    if bias is None and mask is None and slopes is None and not scalars[2]:
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
        parts = splits(batch * H_kv, queries * (H // H_kv), keys, multiprocessors)
    scratch = lse.new_empty(parts, lse.numel(), v.shape[-1] + 2) if parts > 1 else None
    compiled.cuda.attention_forward(
        q, k, v, bias, mask, slopes, sinks, out, lse, statistics, sequences, window, scalars, 0, scratch
    )
