"""attention's products on AMX tiles, by a model of the instructions where the processor has none."""

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.reference import attention as reference

# B, H, H_kv, T_q, T_k, D, Dv and options: rows and dims that fill tiles and that do not.
CASES = {
    "one element": ((1, 1, 1, 1, 1, 1, 1), {}),
    "no multiple of a tile": ((1, 2, 1, 45, 70, 24, 40), {"causal": True}),
    "several tiles of keys": ((1, 1, 1, 80, 300, 64, 64), {"causal": True}),
    "a window": ((1, 1, 1, 150, 330, 16, 16), {"window": (40, 3)}),
    "dims of 256": ((1, 1, 1, 20, 40, 256, 256), {"softcap": 3.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_on_tiles(amx, name, monkeypatch):
    monkeypatch.setattr(compiled, "cpu", amx)
    (B, H, H_kv, T_q, T_k, D, Dv), options = CASES[name]
    given = [torch.randn(s).bfloat16() for s in ((B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, Dv))]
    oracle.check(*(lambda *t, f=f: f(*t, **options) for f in (lk.attention, reference.attention)), given)


def test_tiles_are_what_ran(amx, monkeypatch):
    """The same bits as without tiles would mean that none was used: their sums are of another order."""
    q, k, v = torch.randn(3, 1, 1, 64, 200).bfloat16()
    found = []
    for module in (compiled.load_cpu("avx512_bf16"), amx):  # not the one in use: it may have tiles
        monkeypatch.setattr(compiled, "cpu", module)
        found.append(lk.attention(q, k, v, return_lse=True)[1])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found)
