"""split_kv: among how many blocks keys are divided, and what the CUDA kernel is given for it."""

from types import SimpleNamespace

import pytest
import torch

from lspm_kernels import compiled, split_kv


@pytest.mark.parametrize(
    ("blocks", "rows", "keys", "parts"),
    [
        (12, 1, 4096, 16),  # as many as leave each 256 keys
        (48, 4, 100_000, 5),  # 240 blocks, of 264 that run at a time on 132 multiprocessors
        (8, 4, 65_536, 30),
        (160, 4, 8192, 3),  # two rounds; with one part 104 of 264 would have no block
        (1000, 1, 100_000, 1),  # enough blocks without
        (1, 1, 200, 1),
        (1, 64, 4096, 16),
        (1, 65, 4096, 0),  # more rows than a block takes
        (0, 1, 4096, 16),
    ],
)
def test_splits(blocks, rows, keys, parts):
    assert split_kv.splits(blocks, rows, keys, 132) == parts


def call(monkeypatch, sequences=None, slopes=None, dropout=0.0, queries=1):
    """What the kernel is given for its scratch."""
    given = []
    monkeypatch.setattr(
        compiled, "cuda", SimpleNamespace(attention_forward=lambda *args: given.append(args)), raising=False
    )
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q, k, v = torch.ones(2, 8, queries, 64), torch.ones(2, 4, 4096, 64), torch.ones(2, 4, 4096, 32)
    lse = torch.ones(2, 8, queries)
    rest = q, lse, torch.ones(2, *lse.shape), sequences, (-1, 0, 0, 0), (0.1, 0.0, dropout)
    split_kv.attention_forward(q, k, v, None, None, slopes, None, *rest)
    return given[0][-1]


def test_scratch_has_a_place_for_every_part(monkeypatch):
    assert call(monkeypatch).shape == (16, 16, 34)
    counts = torch.ones(64, dtype=torch.int32)  # 64 sequences of 4 key heads, each read by two
    assert call(monkeypatch, (None, None, counts, None, 1, 4096)).shape[0] == 1
    assert call(monkeypatch, (None, None, counts, None, 1, 400)) is None
    assert call(monkeypatch, (torch.ones(3), torch.ones(3), None, None, 1, 1000)).shape[0] == 3


def test_there_is_none_for_what_the_kernel_does_not_divide(monkeypatch):
    assert call(monkeypatch, queries=40) is None
    assert call(monkeypatch, dropout=0.1) is None
    assert call(monkeypatch, slopes=torch.ones(2, 8, 1, 1)) is None
