"""embedding: rows of tables, norm and dropout against the reference, and what is an error."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import embedding as ops
from lspm_kernels.reference import embedding as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the tensors weight, position_weight, token_type_weight, norm_weight and norm_bias, which there are.
KINDS = {
    "tokens": "w",
    "gpt": "wp",
    "types": "wt",
    "bert": "wptnb",
    "norm without bias": "wn",
    "positions and norm": "wpnb",
}
NAMES = {"w": "weight", "p": "position_weight", "t": "token_type_weight", "n": "norm_weight", "b": "norm_bias"}
N, P, TYPES = 50, 23, 2


def made(kind, dim, dtype=torch.float32, norm_dtype=None):
    sizes = {"w": (N, dim), "p": (P, dim), "t": (TYPES, dim), "n": (dim,), "b": (dim,)}
    return [torch.randn(sizes[c]).to(norm_dtype or dtype if c in "nb" else dtype) for c in KINDS[kind]]


def bound(f, kind, tokens, **options):
    if "t" in KINDS[kind]:
        options.setdefault("token_types", tokens % TYPES)

    def call(*tensors):
        given = dict(zip((NAMES[c] for c in KINDS[kind]), tensors, strict=True))
        return f(tokens, **given, **options)

    return call


def check(kind, tokens, tensors, **options):
    ours, theirs = (bound(f.embedding, kind, tokens, **options) for f in (lk, reference))
    oracle.check(ours, theirs, tensors)


def drawn(*shape, integer=torch.int64):
    """Half of the tokens are of four rows."""
    tokens = torch.randint(N, shape)
    return torch.where(torch.rand(shape) < 0.5, tokens, tokens % 4).to(integer)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, dtype):
    for dim in (1, 16, 40, 64, 300):
        for p in (0.0, 0.3):
            check(kind, drawn(3, 7), made(kind, dim, dtype), dropout_p=p, seed=3, padding_idx=1)


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(1,), (23,), (2, 3, 5), (0, 4), (3, 0), (1, 1)])
def test_tokens_of_any_shape(shape):
    for kind, integer in itertools.product(("tokens", "bert"), (torch.int32, torch.int64)):
        check(kind, drawn(*shape, integer=integer), made(kind, 40), dropout_p=0.2, seed=1)


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_float32_norm_beside_half_tables(dtype):
    for dim in (40, 100):
        check("bert", drawn(3, 7), made("bert", dim, dtype, torch.float32), dropout_p=0.3, seed=1)


@pytest.mark.every_backend
def test_positions():
    tokens, tensors = drawn(3, 7), made("gpt", 40)
    places = torch.randint(P, (3, 7))
    for positions in (0, 5, P - 7, places, places[0], places[:, :1].int()):
        check("gpt", tokens, tensors, positions=positions)
    weight, table = tensors
    at = lk.embedding(tokens, weight, position_weight=table, positions=4)
    assert torch.equal(at, weight[tokens] + table[4:11])
    assert torch.equal(lk.embedding(tokens, weight, position_weight=table, positions=torch.arange(4, 11)), at)


@pytest.mark.every_backend
@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_has_no_gradient_as_in_torch(padding_idx):
    tokens = torch.tensor([[0, 3, N - 1, 3], [3, 0, 7, N - 1]])
    weight = torch.randn(N, 8, requires_grad=True)
    y = lk.embedding(tokens, weight, padding_idx)
    theirs = F.embedding(tokens, weight, padding_idx)
    assert torch.equal(y, theirs)
    weights = torch.randn_like(y)
    found, expected = (torch.autograd.grad(out, weight, weights)[0] for out in (y, theirs))
    assert torch.equal(found, expected) and not found[padding_idx].any()


@pytest.mark.every_backend
def test_drops_what_dropout_drops():
    for dim in (40, 64, 100):
        tokens, (weight, table) = drawn(3, 7), made("gpt", dim)
        y = lk.embedding(tokens, weight, position_weight=table, dropout_p=0.4, seed=8)
        plain = lk.embedding(tokens, weight, position_weight=table)
        assert torch.equal(y, lk.dropout(plain, 0.4, seed=8))
    assert not lk.embedding(tokens, weight * float("nan"), dropout_p=1.0).any()


@pytest.mark.every_backend
def test_magnitudes_and_what_is_not_finite():
    for scale in (1e8, 1e-8):
        tensors = made("bert", 40)
        tensors[:3] = [t * scale for t in tensors[:3]]
        check("bert", drawn(3, 7), tensors, eps=1e-5 * scale**2)
    tensors = made("bert", 40)
    tensors[0] = tensors[0] + 1e3  # a large mean cancels nothing
    check("bert", drawn(3, 7), tensors)
    for value in (float("nan"), float("inf")):
        tensors = made("bert", 40)
        tensors[0][2, 5] = value
        y = bound(lk.embedding, "bert", torch.tensor([[1, 2, 3]]))(*tensors)
        assert y.isnan().any(-1).tolist() == [[False, True, False]]


def test_a_plain_row_keeps_its_bits():
    weight = torch.full((N, 64), 1e-40, dtype=torch.bfloat16)  # subnormal
    assert torch.equal(lk.embedding(drawn(9), weight), weight[:9]) and weight.any()
    tokens = drawn(40_000)
    assert torch.equal(lk.embedding(tokens, weight), weight[tokens])  # streamed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tokens", "bert"])
def test_same_bits_for_any_number_of_threads(kind, dtype):
    for tokens, dim in ((drawn(90, P), 130), (drawn(100, P), 1024)):  # the second one is streamed
        tensors, results = made(kind, dim, dtype), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            call = bound(lk.embedding, kind, tokens, dropout_p=0.1, seed=1)
            results.append(oracle.outputs_and_gradients(call, tensors))
        for name, first in results[0].items():
            assert all(torch.equal(first, other[name]) for other in results[1:]), name
    part = bound(reference.embedding, kind, tokens[:2], dropout_p=0.1, seed=1)(*tensors)
    torch.testing.assert_close(results[0]["output 0"][:2], part, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for kind, dim, p in itertools.product(KINDS, (5, 77, 128), (0.0, 0.4)):
        check(kind, drawn(2, 9), made(kind, dim, dtype), dropout_p=p, seed=3)


@pytest.mark.every_backend
def test_tables_that_are_not_contiguous():
    def turned(f):
        return lambda w, p, n: f(
            drawn_once.t(), w.t(), position_weight=p[::2], norm_weight=n[::2], norm_bias=n[1::2]
        )

    drawn_once = drawn(3, 7)
    given = [torch.randn(40, N), torch.randn(2 * P, 40), torch.randn(80)]
    oracle.check(turned(lk.embedding), turned(reference.embedding), given)


@pytest.mark.every_backend
def test_a_gradient_for_one_tensor_alone():
    tokens, tensors = drawn(3, 7), made("bert", 40)
    for wanted in range(5):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        found, expected = (
            torch.autograd.grad(
                bound(f.embedding, "bert", tokens)(*leaves).pow(2).sum(), leaves[wanted]
            )[0]
            for f in (lk, reference)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_outputs_size_is_kept():
    tokens, tensors, kept = drawn(40, P), [t.requires_grad_() for t in made("bert", 64)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bound(lk.embedding, "bert", tokens, dropout_p=0.1)(*tensors)
    own = {t.data_ptr() for t in (*tensors, tokens)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) < y.nbytes / 8


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
    "tokens must be an int32 or int64 tensor of one dimension or more, got list": lambda: lk.embedding([0], TABLE),
    "tokens must be an int32 or int64 tensor of one dimension or more, got () torch.int64": lambda: lk.embedding(
        torch.tensor(1), TABLE
    ),
    "weight must be a floating-point tensor (N, D), got (8,) torch.float32": lambda: lk.embedding(TOKENS, TABLE[0]),
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
    "position_weight must be there beside positions, got None": lambda: lk.embedding(TOKENS, TABLE, positions=1),
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
    "norm_weight must be there beside norm_bias, got None": lambda: lk.embedding(TOKENS, TABLE, norm_bias=TABLE[0]),
    "norm_weight must be a tensor of shape (8,), got (7,)": lambda: lk.embedding(
        TOKENS, TABLE, norm_weight=TABLE[0, 1:]
    ),
    "norm_bias must have dtype torch.float32, got torch.float16": lambda: lk.embedding(
        TOKENS, TABLE, norm_weight=TABLE[0], norm_bias=TABLE[0].half()
    ),
    "dropout_p must be from 0 to 1, got -0.1": lambda: lk.embedding(TOKENS, TABLE, dropout_p=-0.1),
    "seed must be an integer from 0 to 2 ** 63 - 1, got 1.0": lambda: lk.embedding(
        TOKENS, TABLE, dropout_p=0.1, seed=1.0
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value) == f"embedding: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    def forward(tokens=TOKENS, weight=TABLE, position_weight=None, out=None, statistics=None, first=0, types=None):
        out = torch.empty(2, 3, 8) if out is None else out
        compiled.cpu.embedding_forward(
            tokens, weight, None, position_weight, None, types, None, None, out, statistics, first, 3, 1e-5,
            0.0, 1.0, 0, 1,
        )  # fmt: skip

    forward()
    for message, call in {
        "out must have another number of elements": lambda: forward(out=torch.empty(2, 2, 8)),
        "a table must have out's columns": lambda: forward(position_weight=torch.empty(9, 7)),
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
