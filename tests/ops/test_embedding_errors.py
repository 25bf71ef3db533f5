"""What embedding refuses, and how it says so."""

import pytest
import torch
from ops.test_embedding import TYPES, N, P, drawn, made

import lspm_kernels as lk
from lspm_kernels import compiled
from lspm_kernels.ops import embedding as ops


@pytest.mark.every_backend
def test_ids_outside_a_table(backend_of_test):
    tokens, (weight, table, types, *_) = drawn(2, 3), made("bert", 8)
    beside = {"position_weight": table, "token_type_weight": types, "token_types": tokens % TYPES}
    wrong = torch.tensor([[0, 1, 2], [1, N, 1]])
    if backend_of_test != "cpu":
        assert lk.embedding(wrong, weight).isnan().all(-1).tolist() == [[False] * 3, [False, True, False]]
        return
    for name, most, options in (
        ("tokens", N - 1, {"tokens": wrong}),
        ("tokens", N - 1, {"tokens": wrong.int()}),
        ("positions", P - 1, {"positions": torch.tensor([0, P, 2])}),
        ("positions", P - 1, {"positions": torch.tensor([0, -1, 2])}),
        ("token_types", TYPES - 1, {"token_types": torch.tensor([0, 1, -7])}),
    ):
        given = {"tokens": tokens, "weight": weight} | beside | options
        ids = given[name]
        got = next(i for i in ids.flatten().tolist() if not 0 <= i <= most)
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError) as error:
                lk.embedding(**given, backend=backend)
            assert str(error.value) == f"embedding: {name} must be from 0 to {most}, got {got}"


TOKENS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.ones(N, 8)
WHERE = "positions must be ids, or where 3 tokens begin among 4 positions, got"
BAD = {
    "tokens must be an int32 or int64 tensor of one dimension or more, got list": lambda: lk.embedding(
        [0], TABLE
    ),
    "tokens must be an int32 or int64 tensor of one dimension or more, got () torch.int64": lambda: (
        lk.embedding(torch.tensor(1), TABLE)
    ),
    "weight must be a floating-point tensor (N, D), got (8,) torch.float32": lambda: lk.embedding(
        TOKENS, TABLE[0]
    ),
    "padding_idx must be None or at least -50 and below 50, got 50": lambda: lk.embedding(TOKENS, TABLE, 50),
    "position_weight must be a tensor (N, 8), got (50, 7)": lambda: lk.embedding(
        TOKENS, TABLE, position_weight=TABLE[:, 1:]
    ),
    "position_weight must have weight's dtype torch.float32, got torch.float16": lambda: lk.embedding(
        TOKENS, TABLE, position_weight=TABLE.half()
    ),
    "position_weight must be on weight's device cpu, got meta": lambda: lk.embedding(
        TOKENS, TABLE, position_weight=TABLE.to("meta")
    ),
    "position_weight must be there beside positions, got None": lambda: lk.embedding(
        TOKENS, TABLE, positions=1
    ),
    f"{WHERE} 2": lambda: lk.embedding(TOKENS, TABLE, position_weight=TABLE[:4], positions=2),
    f"{WHERE} -1": lambda: lk.embedding(TOKENS, TABLE, position_weight=TABLE[:4], positions=-1),
    f"{WHERE} None": lambda: lk.embedding(TOKENS, TABLE, position_weight=TABLE[:4], positions=None),
    "positions must broadcast to tokens' shape (2, 3), got (2,)": lambda: lk.embedding(
        TOKENS, TABLE, position_weight=TABLE, positions=TOKENS[:, 0]
    ),
    "positions must be an int32 or int64 tensor, got (8,) torch.float32": lambda: lk.embedding(
        TOKENS, TABLE, position_weight=TABLE, positions=TABLE[0]
    ),
    "token_types must be there beside token_type_weight, got None": lambda: lk.embedding(
        TOKENS, TABLE, token_type_weight=TABLE
    ),
    "token_type_weight must be there beside token_types, got None": lambda: lk.embedding(
        TOKENS, TABLE, token_types=TOKENS
    ),
    "norm_weight must be there beside norm_bias, got None": lambda: lk.embedding(
        TOKENS, TABLE, norm_bias=TABLE[0]
    ),
    "norm_weight must be a tensor of shape (8,), got (7,)": lambda: lk.embedding(
        TOKENS, TABLE, norm_weight=TABLE[0, 1:]
    ),
    "norm_bias must have dtype torch.float32, got torch.float16": lambda: lk.embedding(
        TOKENS, TABLE, norm_weight=TABLE[0], norm_bias=TABLE[0].half()
    ),
    "dropout_p must be from 0 to 1, got -0.1": lambda: lk.embedding(TOKENS, TABLE, dropout_p=-0.1),
    "eps must be finite and at least 0, got 'x'": lambda: lk.embedding(TOKENS, TABLE, eps="x"),
    "seed must be an integer from 0 to 2 ** 63 - 1, got 1.0": lambda: lk.embedding(
        TOKENS, TABLE, dropout_p=0.1, seed=1.0
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value) == f"embedding: {message}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("tokens must be from 0 to -1, got 0", {"weight": TABLE[:0]}),
        ("positions must be from 0 to -1, got 0", {"position_weight": TABLE[:0], "positions": TOKENS * 0}),
        (
            "token_types must be from 0 to -1, got 0",
            {"token_type_weight": TABLE[:0], "token_types": TOKENS * 0},
        ),
    ],
)
def test_a_table_without_rows_has_none_to_give(message, given, backend):
    """Its memory is nowhere, as is that of a table that is not given."""
    with pytest.raises(ValueError) as error:
        lk.embedding(TOKENS * 0, **{"weight": TABLE} | given, backend=backend)
    assert str(error.value) == f"embedding: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    def forward(
        tokens=TOKENS, weight=TABLE, position_weight=None, out=None, statistics=None, first=0, types=None
    ):
        out = torch.empty(2, 3, 8) if out is None else out
        compiled.cpu.embedding_forward(
            tokens, weight, None, position_weight, None, types, None, None, out, statistics, first, 3, 1e-5,
            0.0, 1.0, 0, 1,
        )  # fmt: skip

    forward()
    for message, call in {
        "out must have another number of elements": lambda: forward(out=torch.empty(2, 2, 8)),
        "position_weight must have out's columns": lambda: forward(position_weight=torch.empty(9, 7)),
        "weight must have the dtype that the contract names": lambda: forward(weight=TABLE.half()),
        "first must leave length positions": lambda: forward(position_weight=TABLE, first=48),
        "tokens must be int32 or int64": lambda: forward(tokens=TOKENS.short()),
        "token_types must be there": lambda: forward(types=TABLE),
        "norm_weight must be there in a norm": lambda: forward(statistics=torch.empty(2, 6)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton"]
    with pytest.raises(NotImplementedError, match="embedding: triton needs a tensor on cuda, got cpu"):
        lk.embedding(TOKENS, TABLE, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="embedding: cpu needs dtype float32, bfloat16, float16"):
        lk.embedding(TOKENS, TABLE.double())
