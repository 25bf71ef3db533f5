"""conv2d's products on AMX tiles, by a model of the instructions where the processor has none."""

import pytest
import torch
from ops.test_conv2d import SHAPES, both, tensors

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled

NAMES = ("1x1", "3x3", "3x3-strided", "3x3-odd-channels", "7x7-stem", "grouped", "rows-of-many-tiles")


@pytest.mark.parametrize("name", NAMES)
def test_on_tiles(amx, name, monkeypatch):
    monkeypatch.setattr(compiled, "cpu", amx)
    oracle.check(*both(name, activation="relu"), tensors(name, torch.bfloat16, bias=True))


def test_tiles_are_what_ran(amx, monkeypatch):
    """The same bits as without tiles would mean that none was used: their sums are of another order."""
    x, weight, _ = tensors("3x3")
    x, weight = x.bfloat16(), (weight * 50).bfloat16()
    found = []
    for module in (compiled.load_cpu("avx512_bf16"), amx):  # not the one in use: it may have tiles
        monkeypatch.setattr(compiled, "cpu", module)
        found.append(lk.conv2d(x, weight, None, *SHAPES["3x3"][2:]))
    torch.testing.assert_close(*found)
