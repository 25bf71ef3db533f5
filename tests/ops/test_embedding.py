"""embedding: rows of tables, norm and dropout against the reference, and what is an error."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
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
NAMES = {
    "w": "weight",
    "p": "position_weight",
    "t": "token_type_weight",
    "n": "norm_weight",
    "b": "norm_bias",
}
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
    check("bert", tokens, made("bert", 40), dropout_p=1.0)


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
            torch.autograd.grad(bound(f.embedding, "bert", tokens)(*leaves).pow(2).sum(), leaves[wanted])[0]
            for f in (lk, reference)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_nothing_of_the_outputs_size_is_kept(kind):
    tokens, tensors, kept = drawn(40, P), [t.requires_grad_() for t in made(kind, 64)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bound(lk.embedding, kind, tokens, dropout_p=0.1)(*tensors)
    own = {t.data_ptr() for t in (*tensors, tokens)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) < y.nbytes / 8


def test_a_table_without_columns_has_an_empty_gradient():
    weight = torch.zeros(4, 0, requires_grad=True)
    out = lk.embedding(torch.tensor([[0, 3]]), weight, backend="cpu")
    out.sum().backward()
    assert out.shape == (1, 2, 0) and weight.grad.shape == (4, 0)
