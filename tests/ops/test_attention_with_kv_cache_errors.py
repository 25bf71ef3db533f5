"""attention_with_kv_cache: what it says of arguments that it cannot take, with nothing appended."""

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

Q, NEW = torch.ones(2, 4, 3, 16), torch.ones(2, 2, 3, 16)
CACHE, AT = torch.ones(2, 2, 50, 16), torch.tensor([10, 47])
PAGES, TABLE = torch.ones(9, 2, 16, 16), torch.arange(8).view(2, 4)
PAGED = {"k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE}
COS = torch.ones(60, 4)
WITHOUT = {"k": None, "v": None}

BAD = {
    "q must be a floating-point tensor (B, H, T, D), got list": {"q": [1.0]},
    "k_cache must be a floating-point tensor (B, H, T, D), got (2, 2, 50, 16) torch.int64": {
        "k_cache": CACHE.long()
    },
    "k_cache must have q's batch size 2, got 3": {
        "k_cache": CACHE.new_ones(3, 2, 50, 16), "v_cache": CACHE.new_ones(3, 2, 50, 16)
    },
    "k_cache must have q's head dim 16, got 8": {"k_cache": CACHE[..., :8]},
    "k_cache must have a number of heads that divides q's 4, got 3": {
        "k_cache": CACHE.new_ones(2, 3, 50, 16)
    },
    "v_cache must have k_cache's batch, heads and length (2, 2, 50), got (2, 2, 49)": {
        "v_cache": CACHE[:, :, :49]
    },
    "v_cache must have q's dtype torch.float32, got torch.bfloat16": {"v_cache": CACHE.bfloat16()},
    "k_cache must be on q's device cpu, got meta": {"k_cache": CACHE.to("meta")},
    "k_cache must have a contiguous last dimension, got strides (1600, 800, 1, 50)": {
        "k_cache": CACHE.new_ones(2, 2, 16, 50).mT
    },
    "k_cache must be without a gradient, got requires_grad=True": {"k_cache": CACHE.clone().requires_grad_()},
    "v must be there where k is, got NoneType": {"v": None},
    "k_cache must not be expanded where k is appended, got strides (1600, 0, 16, 1)": {
        "k_cache": CACHE[:, :1].expand(2, 2, 50, 16)
    },
    "k must be a tensor (B, H_kv, T, D), got list": {"k": [1.0]},
    "v must be a tensor (B, H_kv, T, D), got (2, 3, 16)": {"v": NEW[0]},
    "k must have shape (2, 2, 3, 16), got (2, 4, 3, 16)": {"k": Q},
    "v must have shape (2, 2, 3, 16), got (2, 2, 2, 16)": {"v": NEW[:, :, :2]},
    "v must have q's dtype torch.float32, got torch.float16": {"v": NEW.half()},
    "cache_seqlens must be given where k is, got None": {"cache_seqlens": None},
    "cache_seqlens must be an int or a tensor, got list": {"cache_seqlens": [10, 47]},
    "cache_seqlens must be a tensor of shape (2,), got (3,)": {"cache_seqlens": torch.ones(3).long()},
    "cache_seqlens must have dtype torch.int32 or torch.int64, got torch.float32": {
        "cache_seqlens": AT.float()
    },
    "cache_seqlens must be from 0 to the cache's room of 50 less 3 new keys, got 48": {"cache_seqlens": 48},
    "cache_seqlens must be from 0 to the cache's room of 50 less 3 new keys, got 1099511627776": {
        "cache_seqlens": 2**40
    },
    "cache_seqlens must be from 0 to the cache's room of 50 less 3 new keys, got -1": {
        "cache_seqlens": AT - 11
    },
    "cache_seqlens must be from 0 to the cache's room of 50 less 0 new keys, got 51": {
        "cache_seqlens": 51, **WITHOUT
    },
    "cache_seqlens must be from 0 to the cache's room of 64 less 3 new keys, got 62": {
        **PAGED, "cache_seqlens": 62
    },
    "block_table must have shape (2, P), got (4,)": {**PAGED, "block_table": TABLE[0]},
    "block_table must have dtype torch.int32 or torch.int64, got torch.float32": {
        **PAGED, "block_table": TABLE.float()
    },
    "block_table must be from 0 to 8, got 9": {**PAGED, "block_table": TABLE + 2},
    "block_table must be from 0 to 8, got -3": {**PAGED, "block_table": TABLE - 3},
    "block_table must come without cache_batch_idx and cache_leftpad": {**PAGED, "cache_leftpad": AT},
    "cache_batch_idx must be from 0 to 1, got 2": {"cache_batch_idx": torch.tensor([0, 2])},
    "cache_leftpad must be from 0 to the keys 13, got 14": {"cache_leftpad": torch.tensor([14, 0])},
    "cos must come with sin and k, got (60, 4)": {"cos": COS},
    "alibi_slopes must not be NaN, got [nan, nan, nan, nan]": {"alibi_slopes": torch.full((4,), torch.nan)},
    "window must be a pair (left, right), got 5": {"window": 5},
    "softcap must be finite and at least 0, got nan": {"softcap": float("nan")},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    given = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "k": NEW * 2, "v": NEW * 2, "cache_seqlens": AT}
    with pytest.raises(ValueError) as error:
        lk.attention_with_kv_cache(**given | BAD[message])
    assert str(error.value) == f"attention_with_kv_cache: {message}"
    assert (CACHE == 1).all() and (PAGES == 1).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("cache_seqlens must be at most 45 by the rows of cos, got 47", {"cos": COS[:48], "sin": COS[:48]}),
        ("cos must be a tensor (S, R / 2), got list", {"cos": [1.0]}),
        ("cos must have a row for each of T = 3 positions, got 2", {"cos": COS[:2], "sin": COS[:2]}),
        ("sin must have cos's dtype torch.float32, got torch.float64", {"sin": COS.double()}),
    ],
)
def test_without_an_angle_nothing_is_appended(message, wrong, backend):
    angles = {"cos": COS, "sin": COS} | wrong
    with pytest.raises(ValueError) as error:
        lk.attention_with_kv_cache(
            Q, CACHE, CACHE, NEW * 2, NEW * 2, cache_seqlens=AT, causal=True, **angles, backend=backend
        )
    assert str(error.value) == f"attention_with_kv_cache: {message}"
    assert (CACHE == 1).all()


def test_the_kernel_checks_what_a_trace_cannot():
    torch._dynamo.reset()

    def step(at, table):
        return lk.attention_with_kv_cache(Q, PAGES, PAGES, cache_seqlens=at, block_table=table)

    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(AT, TABLE), step(AT, TABLE))
    for message, given in {
        "key_counts must be at least 0 and within the cache, got 70": (AT + 23, TABLE),
        "pages must be at least 0 and below 9, got 9": (AT, TABLE + 5),
    }.items():
        with pytest.raises(ValueError, match=message):
            traced(*given)


COUNTS = "^attention_with_kv_cache: cache_seqlens must be"


@pytest.mark.parametrize(
    ("message", "at", "table"),
    [
        (f"{COUNTS} from 0 to the cache's room of 64 less 3 new keys, got -1", AT - 8, TABLE),
        (f"{COUNTS} from 0 to the cache's room of 64 less 3 new keys, got 62", AT + 18, TABLE),
        (f"{COUNTS} from 0 to the cache's room of 0 less 3 new keys, got 7", AT, TABLE[:, :0]),
        ("pages must be at least 0 and below 9, got 9", AT, TABLE + 3),
        (f"{COUNTS} at most 57 by the rows of cos, got 58", AT + 14, TABLE),
    ],
)
def test_the_kernel_that_appends_checks_what_it_reads(message, at, table):
    counts, table = at.int(), table.int()
    with pytest.raises(ValueError, match=message):
        compiled.cpu.attention_with_kv_cache_append(
            Q, NEW * 2, NEW * 2, Q.clone(), PAGES, PAGES, counts, table, COS, COS, False, True, 1
        )
    assert (PAGES == 1).all()
