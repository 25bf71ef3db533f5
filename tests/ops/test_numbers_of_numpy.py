"""Numbers that NumPy gives, as a configuration often holds them, do what Python's do."""

import numpy
import pytest
import torch

import lspm_kernels as lk
from lspm_kernels.compat.flash_attn import flash_attn_func

X, W = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3)
Q, TARGET = torch.randn(1, 6, 2, 8), torch.tensor([0, 3, 1, 5])

# A call of each check, with the two that make its whole numbers and its fractions.
CALLS = {
    "conv2d": lambda n, _: lk.conv2d(X, W, stride=n(2), padding=(n(1), n(0)), dilation=n(1), groups=n(2)),
    "max_pool2d": lambda n, _: lk.max_pool2d(X, (n(3), n(2)), stride=n(2), padding=n(1), dilation=n(2)),
    "attention": lambda n, f: lk.attention(Q, Q, Q, window=(n(1), n(0)), scale=f(0.5), softcap=f(2)),
    "flash_attn_func": lambda n, _: flash_attn_func(Q, Q, Q, window_size=(n(2), n(-1))),
    "embedding_bag": lambda n, _: lk.embedding_bag(Q[0, :, 0], TARGET[None], padding_idx=n(-1)),
    "cross_entropy": lambda n, f: lk.cross_entropy(
        Q[0, :4, 0], TARGET, ignore_index=n(3), label_smoothing=f(0.25)
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_numbers_of_numpy(op):
    assert torch.equal(CALLS[op](numpy.int64, numpy.float32), CALLS[op](int, float))


@pytest.mark.parametrize("value", [numpy.bool_(True), numpy.float64(2)], ids=["bool", "float"])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^conv2d: stride must be an integer of at least 1, or two, got "):
        lk.conv2d(X, W, stride=value, groups=2)
    with pytest.raises(ValueError, match=r"^max_pool2d: kernel_size must be an integer of at least 1, or"):
        lk.max_pool2d(X, value)
