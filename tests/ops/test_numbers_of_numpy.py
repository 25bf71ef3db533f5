"""Attention and rotary take NumPy's numbers where they take Python's."""

import warnings

import numpy as np
import pytest
import torch

import lspm_kernels as lk
from lspm_kernels.compat.flash_attn import flash_attn_func

X = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(0))
ROWS, ENDS = X[0].transpose(0, 1), torch.tensor([0, 2, 6])


def cached(length):
    """Of a cache that is appended to."""
    return lk.attention_with_kv_cache(X[:, :, :1], X, X, X[:, :, :1] + 1, X[:, :, :1], cache_seqlens=length)


CALLS = {
    "window": (lambda n: lk.attention(X, X, X, window=(n, n)), np.int64(2)),
    "narrow window": (lambda n: lk.attention(X, X, X, window=(n, None)), np.uint8(2)),
    "window_size": (lambda n: flash_attn_func(X, X, X, window_size=(n, -n)), np.int32(1)),
    "scale": (lambda n: lk.attention(X, X, X, scale=n), np.float16(0.5)),
    "max_seqlen": (lambda n: lk.attention_varlen(ROWS, ROWS, ROWS, ENDS, ENDS, n, n), np.int64(4)),
    "cache_seqlens": (cached, np.int64(3)),
    "offsets": (lambda n: lk.rotary(X, torch.rand(9, 4), torch.rand(9, 4), offsets=n), np.int64(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_equal_pythons(name):
    call, number = CALLS[name]
    found = []
    for n in (number, number.item()):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(call(n))
    assert torch.equal(*found)


def test_what_is_no_number_of_sides_is_still_refused():
    for side in (np.int64(-1), np.float32(2), np.bool_(True)):
        with pytest.raises(ValueError, match="window must have sides that are None or at least 0, got"):
            lk.attention(X, X, X, window=(side, 0))
