"""lspm_kernels.nn: MultiheadAttention and TransformerEncoderLayer, against torch.nn's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lspm_kernels as lk
from lspm_kernels import products
from torch_layers import DTYPES, Called, check, is_ours, pair, same

E, H, B, T, S = 64, 4, 3, 100, 90


@pytest.fixture
def torchs_products(monkeypatch):
    """Of both sides, so that what errs is what lies between them; ours have tests of their own."""
    monkeypatch.setattr(products, "faster", False)


def inputs(*lengths, batch_first=True, dtype=torch.float32, width=E):
    shapes = [(B, n, width) if batch_first else (n, B, width) for n in lengths]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding(length):
    hidden = torch.zeros(B, length, dtype=torch.bool)
    hidden[1, 70:] = hidden[2, 3:] = True
    return hidden


def added(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


MASKS = {
    "none": {},
    "causal": {"attn_mask": causal(T), "is_causal": True},
    "bool": {"attn_mask": causal(T)},
    "float": {"attn_mask": torch.randn(T, T)},
    "padding": {"key_padding_mask": padding(T)},
    "float padding": {"key_padding_mask": added(padding(T))},
    "both": {"attn_mask": causal(T), "key_padding_mask": padding(T), "is_causal": True},
    "both float": {"attn_mask": torch.randn(T, T), "key_padding_mask": added(padding(T))},
    "of heads": {"attn_mask": torch.rand(B * H, T, T) < 0.3},
}


@pytest.mark.usefixtures("torchs_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(batch_first, dtype):
    check(*self_attention(batch_first=batch_first), inputs(T, batch_first=batch_first, dtype=dtype))


@pytest.mark.usefixtures("torchs_products")
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    check(*self_attention(batch_first=True), inputs(T), **MASKS[mask])


def self_attention(**options):
    return tuple(Self(module) for module in pair("MultiheadAttention", E, H, **options))


class Self(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, **masks):
        y, weights = self.attention(x, x, x, need_weights=False, **masks)
        assert weights is None
        return y


@pytest.mark.usefixtures("torchs_products")
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 40, "vdim": 48}, {"kdim": 40, "bias": False}]
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_to_others(options, batch_first):
    modules = pair("MultiheadAttention", E, H, batch_first=batch_first, **options)
    (q,) = inputs(T, batch_first=batch_first)
    (k,) = inputs(S, batch_first=batch_first, width=options.get("kdim", E))
    (v,) = inputs(S, batch_first=batch_first, width=options.get("vdim", E))
    check(*modules, [q, k, v], need_weights=False, key_padding_mask=padding(S))


def test_keys_that_are_values_and_inputs_without_a_batch():
    ours, theirs = pair("MultiheadAttention", E, H)
    q, k = torch.randn(300, E), torch.randn(S, E)
    for module in (Called(lambda q, k: ours(q, k, k, need_weights=False)[0]),):
        assert is_ours(module, q, k)
    for args in ((q, k, k), (q, q, q), (q[:, None].expand(-1, B, -1), *[k[:, None].expand(-1, B, -1)] * 2)):
        actual, expected = (m(*args, need_weights=False)[0] for m in (ours, theirs))
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()


def test_attention_under_autocast_and_in_evaluation():
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=True, train=False)
    (x,) = inputs(200)
    with torch.no_grad():
        assert is_ours(ours, x, x, x, need_weights=False)
        torch.testing.assert_close(*(m(x, x, x, need_weights=False)[0] for m in (ours, theirs)))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (
            m(x, x, x, need_weights=False, attn_mask=added(causal(200)))[0] for m in (ours, theirs)
        )
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_attention_that_is_torchs():
    (x,) = inputs(T)
    modules = pair("MultiheadAttention", E, H, batch_first=True)
    same(*modules, x, x, x)
    same(*modules, x, x, x, average_attn_weights=False, key_padding_mask=padding(T))
    same(*modules, x[:, :4], x, x, need_weights=False)
    same(*modules, x, x, x, need_weights=False, attn_mask=torch.randn(T, T, requires_grad=True))
    for options in (
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"dtype": torch.float64},
        {"dropout": 1.0},
    ):
        other = x.to(options.get("dtype", x.dtype))
        same(
            *pair("MultiheadAttention", E, H, batch_first=True, **options),
            other,
            other,
            other,
            need_weights=False,
        )
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        modules[0](x, x, x, need_weights=False, is_causal=True)
    with pytest.raises(RuntimeError, match="shape of the 2D attn_mask"):
        modules[0](x, x, x, need_weights=False, attn_mask=causal(T - 1))


def test_dropout_of_probabilities():
    ours, _ = pair("MultiheadAttention", E, H, dropout=0.5)
    (x,) = inputs(T, batch_first=False)
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(ours.eval()(x, x, x, need_weights=False)[0] for _ in range(2)))


def layer(*args, train=True, **options):
    # So little is dropped that it is nothing, by the way of what drops.
    options = {"dropout": 1e-12, "batch_first": True} | options
    return pair("TransformerEncoderLayer", *(args or (E, H, 96)), train=train, **options)


@pytest.mark.usefixtures("torchs_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(norm_first, train, dtype):
    # A smooth activation: where half types round a ReLU's input to 0, gradients differ by all they are.
    check(*layer(norm_first=norm_first, train=train, activation="gelu"), inputs(200, dtype=dtype))


@pytest.mark.usefixtures("torchs_products")
@pytest.mark.parametrize("activation", ["gelu", F.silu, nn.GELU("tanh"), nn.ReLU(), nn.SiLU()])
def test_encoder_layers_activations(activation):
    for dropout in (0.0, 1e-12):
        check(*layer(activation=activation, dropout=dropout), inputs(200))


@pytest.mark.usefixtures("torchs_products")
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "of heads"])
def test_encoder_layers_masks(mask):
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    masks = {names.get(name, name): value for name, value in MASKS[mask].items()}
    check(*layer(bias="float" not in mask, dropout=0.0, batch_first=True), inputs(T), **masks)


def test_encoder_layer_in_evaluation():
    for norm_first, batch_first in itertools.product((True, False), repeat=2):
        ours, theirs = layer(norm_first=norm_first, batch_first=batch_first, train=False)
        (x,) = inputs(200, batch_first=batch_first)
        with torch.no_grad():
            assert is_ours(ours, x)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = ours(x), theirs(x)
            with torch.no_grad():  # torch's own path for this keeps bfloat16 throughout
                same(ours, theirs, x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=4e-2)


def test_encoder_layers_that_are_torchs():
    (x,) = inputs(200)
    same(*layer(activation=torch.tanh), x)
    same(*layer(dtype=torch.float64), x.double())
    same(*layer(), x[:, :5])
    ours, theirs = layer()
    seen = []
    handle = ours.norm1.register_forward_hook(lambda *_: seen.append(1))
    same(ours, theirs, x)
    handle.remove()
    assert seen and is_ours(ours, x)
    for name, part in {"linear1": Doubled(E, 96), "norm2": nn.Identity(), "dropout": nn.Identity()}.items():
        ours, theirs = layer()
        setattr(ours, name, part), setattr(theirs, name, part)
        same(ours, theirs, x)
    ours, theirs = layer()
    ours.linear1 = theirs.linear1 = lk.nn.Linear(E, 96, activation="gelu")
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_encoder_layers_drop_out():
    ours, _ = layer(dropout=0.5)
    (x,) = inputs(200)
    assert not torch.equal(ours(x), ours(x))
    ours.dropout1.eval(), ours.dropout2.eval(), ours.dropout.eval(), ours.self_attn.eval()
    assert is_ours(ours, x) and torch.equal(ours(x), ours(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_whole_encoder_makes_nested_tensors_for_torchs_layers():
    (x,) = inputs(200)
    hidden = torch.zeros(B, 200, dtype=torch.bool)
    hidden[:, 150:] = True
    encoders = [nn.TransformerEncoder(each, 2).eval() for each in layer(train=False)]
    encoders[0].load_state_dict(encoders[1].state_dict())
    with torch.no_grad():
        actual, expected = (e(x, src_key_padding_mask=hidden) for e in encoders)
    torch.testing.assert_close(actual[~hidden[:, : actual.shape[1]]], expected[~hidden[:, : actual.shape[1]]])
