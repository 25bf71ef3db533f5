"""Numbers that NumPy gives, as a configuration often holds them, do what Python's do."""

import warnings

import numpy as np
import pytest
import torch

import lspm_kernels as lk
from lspm_kernels.compat.flash_attn import flash_attn_func

IMAGES, FILTERS = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3)
X = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(0))
ROWS, ENDS = X[0].transpose(0, 1), torch.tensor([0, 2, 6])
TABLE, CLASSES = torch.randn(6, 8), torch.tensor([0, 3, 1, 5])


def cached(length):
    """Of a cache that is appended to."""
    return lk.attention_with_kv_cache(X[:, :, :1], X, X, X[:, :, :1] + 1, X[:, :, :1], cache_seqlens=length)


CALLS = {
    "stride": (lambda n: lk.conv2d(IMAGES, FILTERS, stride=n, groups=n), np.int64(2)),
    "padding": (lambda n: lk.conv2d(IMAGES[:, :2], FILTERS, padding=(n, 0), dilation=n), np.int64(1)),
    "kernel_size": (lambda n: lk.max_pool2d(IMAGES, (n, 3), stride=n, dilation=n), np.int64(2)),
    "window": (lambda n: lk.attention(X, X, X, window=(n, n)), np.int64(2)),
    "narrow window": (lambda n: lk.attention(X, X, X, window=(n, None)), np.uint8(2)),
    "window_size": (lambda n: flash_attn_func(X, X, X, window_size=(n, -n)), np.int32(1)),
    "scale": (lambda n: lk.attention(X, X, X, scale=n), np.float16(0.5)),
    "max_seqlen": (lambda n: lk.attention_varlen(ROWS, ROWS, ROWS, ENDS, ENDS, n, n), np.int64(4)),
    "cache_seqlens": (cached, np.int64(3)),
    "offsets": (lambda n: lk.rotary(X, torch.rand(9, 4), torch.rand(9, 4), offsets=n), np.int64(2)),
    "padding_idx": (lambda n: lk.embedding_bag(TABLE, CLASSES[None], padding_idx=n), np.int64(-1)),
    "ignore_index": (lambda n: lk.cross_entropy(TABLE[:4], CLASSES, ignore_index=n), np.int64(3)),
    "label_smoothing": (lambda n: lk.cross_entropy(TABLE[:4], CLASSES, label_smoothing=n), np.float32(0.25)),
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


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(2)], ids=["bool", "float"])
def test_what_is_no_whole_number_is_still_refused(value):
    with pytest.raises(ValueError, match=r"^conv2d: stride must be an integer of at least 1, or two, got "):
        lk.conv2d(IMAGES, FILTERS, stride=value, groups=2)
    with pytest.raises(ValueError, match=r"^max_pool2d: kernel_size must be an integer of at least 1, or"):
        lk.max_pool2d(IMAGES, value)
