"""conv2d: every misuse is named, and nothing is written outside."""

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

X, W = torch.ones(2, 8, 7, 6), torch.ones(16, 8, 3, 3)

BAD = {
    "conv2d: x must be a floating-point tensor (N, C, H, W) or (C, H, W), got list": ([1.0], W),
    "conv2d: x must be a floating-point tensor (N, C, H, W) or (C, H, W), got (7, 6) torch.float32": (
        torch.ones(7, 6),
        W,
    ),
    "conv2d: x must be a floating-point tensor (N, C, H, W) or (C, H, W), got (2, 8, 7, 6) torch.int64": (
        X.long(),
        W,
    ),
    "conv2d: weight must be a tensor (K, C / groups, R, S), none of them 0, got (16, 8, 3)": (X, W[..., 0]),
    "conv2d: weight must be a tensor (K, C / groups, R, S), none of them 0, got (0, 8, 3, 3)": (X, W[:0]),
    "conv2d: weight must be a tensor (K, C / groups, R, S), none of them 0, got float": (X, 1.0),
    "conv2d: x must have weight's 4 channels times groups 1, got 8": (X, W[:, :4]),
    "conv2d: groups must divide weight's 16 filters, got 3": (X, W, None, 1, 0, 1, 3),
    "conv2d: groups must divide weight's 16 filters, got 0": (X, W, None, 1, 0, 1, 0),
    "conv2d: weight must have x's dtype torch.float32, got torch.bfloat16": (X, W.bfloat16()),
    "conv2d: weight must be on x's device cpu, got meta": (X, W.to("meta")),
    "conv2d: bias must be a tensor of shape (16,), got (8,)": (X, W, torch.ones(8)),
    "conv2d: bias must have dtype torch.float32, got torch.int64": (
        X,
        W,
        torch.ones(16).long(),
    ),
    "conv2d: stride must be an integer of at least 1, or two, got 0": (X, W, None, 0),
    "conv2d: stride must be an integer of at least 1, or two, got True": (X, W, None, True),
    "conv2d: stride must be an integer of at least 1, or two, got (1, 2, 3)": (X, W, None, (1, 2, 3)),
    "conv2d: padding must be an integer of at least 0, or two, got (0, -1)": (X, W, None, 1, (0, -1)),
    "conv2d: padding must be 'same', 'valid', an integer or two, got 'sane'": (X, W, None, 1, "sane"),
    "conv2d: padding 'same' must come with a stride of 1, got (2, 2)": (X, W, None, 2, "same"),
    "conv2d: dilation must be an integer of at least 1, or two, got 1.5": (X, W, None, 1, 0, 1.5),
    "conv2d: x with its padding must be at least the kernel's (3, 3), got (2, 6)": (X[:, :, :2], W),
    "conv2d: x with its padding must be at least the kernel's (9, 9), got (7, 6)": (X, W, None, 1, 0, 4),
}
BAD_OPTIONS = {
    "conv2d: activation must be one of None, relu, relu6, silu, gelu, got 'tanh'": {"activation": "tanh"},
    "conv2d: residual must be a tensor of y's shape (2, 16, 5, 4), got (2, 8, 7, 6)": {"residual": X},
    "conv2d: residual must be a tensor of y's shape (2, 16, 5, 4), got int": {"residual": 1},
    "conv2d: residual must have x's dtype torch.float32, got torch.float64": {
        "residual": torch.ones(2, 16, 5, 4, dtype=torch.float64)
    },
    "conv2d: residual must be on x's device cpu, got meta": {
        "residual": torch.ones(2, 16, 5, 4, device="meta")
    },
    "conv2d: scale must be a tensor of shape (16,), got (1, 16)": {"scale": torch.ones(1, 16)},
    "conv2d: shift must be a tensor of shape (16,), got float": {"shift": 0.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        lk.conv2d(*BAD[message])
    assert str(error.value) == message


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options(message):
    with pytest.raises(ValueError) as error:
        lk.conv2d(X, W, **BAD_OPTIONS[message])
    assert str(error.value) == message


@pytest.mark.parametrize("residual", [torch.ones(1, 16, 5, 4), 1], ids=["four dimensions", "int"])
def test_a_residual_of_one_image(residual):
    got = "int" if isinstance(residual, int) else r"\(1, 16, 5, 4\)"
    rule = r"a tensor \(K, H', W'\) beside x of three dimensions"
    with pytest.raises(ValueError, match=f"^conv2d: residual must be {rule}, got {got}$"):
        lk.conv2d(X[0], W, residual=residual)


def test_other_dtypes_and_backends():
    with pytest.warns(
        lk.FallbackWarning, match="conv2d: cpu needs dtype float32, bfloat16, float16, got flo"
    ):
        lk.conv2d(X.double(), W.double())
    with pytest.raises(ValueError, match=r"conv2d: backend must be one of cpu, .*reference, got 'gpu'"):
        lk.conv2d(X, W, backend="gpu")


def test_the_binding_refuses_what_would_touch_other_memory():
    x, y = X.permute(0, 2, 3, 1).contiguous(), torch.empty(2, 5, 4, 16)
    plain = ((1, 1), (0, 0), (1, 1), 1)
    for message, wrong in {
        "y must have x's batch and weight's filters": (x, W, None, None, None, y[:1], None, plain, 0),
        "x must be contiguous": (X.permute(0, 2, 3, 1), W, None, None, None, y, None, plain, 0),
        "scale must have another number of elements": (x, W, torch.ones(4), None, None, y, None, plain, 0),
        "residual must have another number of elements": (x, W, None, None, y[:1], y, None, plain, 0),
        "groups must divide the channels": (x, W[:, :3], None, None, None, y, None, plain, 0),
        "stride, padding and dilation must be": (
            x,
            W,
            None,
            None,
            None,
            y,
            None,
            ((0, 1), (0, 0), (1, 1), 1),
            0,
        ),
        "activation must be one of the enumeration": (x, W, None, None, None, y, None, plain, 9),
    }.items():
        with pytest.raises(ValueError, match=message):
            compiled.cpu.conv2d_forward(*wrong, 1)
    with pytest.raises(ValueError, match="dweight must lie as weight does"):
        compiled.cpu.conv2d_backward(y, x, W, None, W.to(memory_format=torch.channels_last), plain, 1)
