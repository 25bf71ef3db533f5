"""attention_varlen: what it says of arguments that it cannot take, and what the binding refuses."""

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

Q, K = torch.ones(30, 4, 16), torch.ones(40, 2, 16)
ENDS_Q, ENDS_K = torch.tensor([0, 20, 30]), torch.tensor([0, 15, 40])
PAGES, TABLE = torch.ones(9, 8, 2, 16), torch.arange(8).view(2, 4)
PAGED = {"k": PAGES, "v": PAGES}

BAD = {
    "q must be a tensor (rows, heads, dim), got (1, 30, 4, 16)": {"q": Q[None]},
    "k must be a tensor (rows, heads, dim), got NoneType": {"k": None},
    "q must be a floating-point tensor (B, H, T, D), got (1, 4, 30, 16) torch.int64": {"q": Q.long()},
    "k must have a number of heads that divides q's 4, got 3": {
        "k": torch.ones(40, 3, 16), "v": torch.ones(40, 3, 16)
    },
    "k must have q's head dim 16, got 8": {"k": K[..., :8]},
    "k must have q's dtype torch.float32, got torch.bfloat16": {"k": K.bfloat16()},
    "v must have k's batch, heads and length (1, 2, 40), got (1, 2, 39)": {"v": K[:39]},
    "cu_seqlens_q must be a tensor of one dimension, got (1, 3)": {"cu_seqlens_q": ENDS_Q[None]},
    "cu_seqlens_q must be a tensor of one dimension, got list": {"cu_seqlens_q": [0, 20, 30]},
    "cu_seqlens_q must have dtype torch.int32 or torch.int64, got torch.float32": {
        "cu_seqlens_q": ENDS_Q.float()
    },
    "cu_seqlens_q must be on q's device cpu, got meta": {"cu_seqlens_q": ENDS_Q.to("meta")},
    "cu_seqlens_q must have an element more than there are sequences, got none": {"cu_seqlens_q": ENDS_Q[:0]},
    "cu_seqlens_q must begin with 0, got 1": {"cu_seqlens_q": torch.tensor([1, 20, 30])},
    "cu_seqlens_k must not decrease, got 41 before 40": {"cu_seqlens_k": torch.tensor([0, 41, 40])},
    "cu_seqlens_k must end with the number of rows 40, got 41": {"cu_seqlens_k": torch.tensor([0, 20, 41])},
    "cu_seqlens_q must end with the number of rows 30, got 29": {"cu_seqlens_q": torch.tensor([0, 20, 29])},
    "cu_seqlens_k must have as many elements as cu_seqlens_q, 3, got 2": {
        "cu_seqlens_k": torch.tensor([0, 40])
    },
    "max_seqlen_q must be at least the longest sequence 20, got 19": {"max_seqlen_q": 19},
    "max_seqlen_k must be at least the longest sequence 25, got 24": {"max_seqlen_k": 24},
    "max_seqlen_q must be an integer of at least 0, got -1": {"max_seqlen_q": -1},
    "max_seqlen_q must be an integer of at least 0, got 2.5": {"max_seqlen_q": 2.5},
    "window must have sides that are None or at least 0, got (-1, 0)": {"window": (-1, 0)},
    "alibi_slopes must have shape (4,) or (2, 4), got (3, 4)": {"alibi_slopes": torch.ones(3, 4)},
    "alibi_slopes must not be NaN, got [1.0, nan, 1.0, 1.0]": {
        "alibi_slopes": torch.tensor([1.0, float("nan"), 1.0, 1.0])
    },
    "sinks must have shape (4,), got (2,)": {"sinks": torch.ones(2)},
    "softcap must be finite and at least 0, got -1.0": {"softcap": -1.0},
    "dropout_p must be at least 0 and below 1, got 1.0": {"dropout_p": 1.0},
    "k must be a tensor (pages, rows, heads, dim), got (40, 2, 16)": {"block_table": TABLE},
    "block_table must have shape (2, P), got (3, 2)": PAGED | {"block_table": TABLE.view(4, 2)[:3]},
    "block_table must be from 0 to 8, got 9": PAGED | {"block_table": TABLE + 2},
    "block_table must have room for 25 keys, got 3 pages of 8": PAGED | {"block_table": TABLE[:, :3]},
    "k must be without a gradient, got requires_grad=True": {
        "k": PAGES.clone().requires_grad_(), "v": PAGES, "block_table": TABLE
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    given = {"q": Q, "k": K, "v": K, "cu_seqlens_q": ENDS_Q, "cu_seqlens_k": ENDS_K} | BAD[message]
    with pytest.raises(ValueError) as error:
        lk.attention_varlen(**given)
    assert str(error.value) == f"attention_varlen: {message}"


def test_the_longest_sequence_must_be_given_where_lengths_cannot_be_read():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="max_seqlen_q must be given where cu_seqlens_q cannot be read"):
        torch.compile(lk.attention_varlen, fullgraph=True)(Q, K, K, ENDS_Q, ENDS_K)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_the_binding_refuses_what_would_touch_other_memory():
    q, k = Q.transpose(0, 1)[None], K.transpose(0, 1)[None]
    pages = PAGES.transpose(1, 2)
    ends_q, ends_k = ENDS_Q.int(), ENDS_K.int()

    def forward(query_starts, key_starts, counts, table, queries, keys, q=q, k=k):
        sequences = query_starts, key_starts, counts, table, queries, keys
        out, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
        options = (-1, 0, 10, 0), (0.25, 0.0, 0.0), 1
        compiled.cpu.attention_forward(q, k, k, None, None, None, None, out, lse, None, sequences, *options)

    packed, dense = (ends_q, ends_k, None, None), (q[:, :, :2].expand(2, -1, -1, -1), pages[:2])
    forward(*packed, 20, 25)
    for message, (*sequences, queries, keys) in {
        "begin with 0, got 1": (i32(1, 20, 30), ends_k, None, None, 20, 25),
        "not decrease, got 30": (i32(0, 31, 30), ends_k, None, None, 31, 25),
        "end with the number of rows, 30, got 31": (i32(0, 20, 31), ends_k, None, None, 20, 25),
        "be at most the longest sequence, 19, apart, got 20": (*packed, 19, 25),
        "have the dtype that the contract names": (ends_q.long(), ends_k, None, None, 20, 25),
        "have at least one element": (ends_q[:0], ends_k, None, None, 20, 25),
    }.items():
        with pytest.raises(ValueError, match=f"query_starts must {message}"):
            forward(*sequences, queries, keys)
    for message, (*sequences, queries, keys) in {
        "end with the number of rows, 40, got 39": (ends_q, i32(0, 15, 39), None, None, 20, 25),
        "have another number of elements": (ends_q, ends_k[:2], None, None, 20, 25),
        "be there where key_counts are not": (ends_q, None, None, None, 20, 25),
        "be None where a sequence has several pages": (ends_q, i32(0, 1), i32(1, 1), TABLE.int(), 20, 25),
    }.items():
        with pytest.raises(ValueError, match=f"key_starts must {message}"):
            forward(*sequences, queries, keys)
    with pytest.raises(ValueError, match="q must have a batch of 1 where sequences are packed"):
        forward(*packed, 20, 25, dense[0])
    within = "key_counts must be at least 0 and within the cache, got "
    for message, (starts, counts, keys) in {
        within + "9": (None, i32(1, 9), 9),
        within + "5": (None, i32(1, 5), 4),
        within + "-1": (None, i32(1, -1), 8),
        within + "8": (i32(0, 1), i32(1, 8), 8),
        "key_starts must be at least 0, got -2": (i32(0, -2), i32(1, 1), 8),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(None, starts, counts, None, 2, keys, *dense)
    for message, table in {
        "be at least 0 and below 9, got 9": TABLE.int() + 4,
        "be at least 0 and below 9, got -5": TABLE.int() - 5,
        "have key_counts and two dimensions": i32(1, 2),
    }.items():
        with pytest.raises(ValueError, match=f"pages must {message}"):
            forward(None, None, i32(1, 9), table, 2, 9, dense[0], pages)
    with pytest.raises(ValueError, match=within + "1"):  # a table without columns has no memory
        forward(None, None, i32(1, 1), TABLE.int()[:, :0], 2, 9, dense[0], pages)
