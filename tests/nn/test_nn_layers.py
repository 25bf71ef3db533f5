"""lspm_kernels.nn: norms, linear layers, activations, embeddings and losses, against torch.nn's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lspm_kernels as lk
from lspm_kernels import products
from lspm_kernels.nn import linears
from torch_layers import DTYPES, check, is_ours, pair, same


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_layer_norm(options, dtype):
    check(*pair("LayerNorm", 96, **options), [drawn(7, 100, 96, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_rms_norm(options, dtype):
    check(*pair("RMSNorm", 96, **options), [drawn(7, 100, 96, dtype=dtype)])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_float32_weights_beside_half_inputs():
    ours, theirs = pair("LayerNorm", 96)
    x = drawn(700, 96, dtype=torch.bfloat16)
    assert is_ours(ours, x)
    torch.testing.assert_close(ours(x), theirs(x))
    same(*pair("RMSNorm", 96), x)  # torch's gives float32


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_that_are_torchs(name):
    same(*pair(name, (8, 96)), drawn(60, 8, 96))
    same(*pair(name, 96, dtype=torch.float64), drawn(400, 96, dtype=torch.float64))
    ours, _ = pair(name, 96)
    with pytest.raises(RuntimeError, match=r"expected input with shape|normalized_shape"):
        ours(drawn(1000, 95))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", linears.ACTIVATIONS)
def test_linear_with_an_activation(activation, bias, dtype):
    ours, theirs = lk.nn.Linear(48, 80, bias, activation=activation), nn.Linear(48, 80, bias)
    ours.load_state_dict(theirs.state_dict())
    act = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}.get(activation, lambda: nn.GELU("tanh"))
    both = Named(theirs, act())
    check(Named(ours), both, [drawn(5, 13, 48, dtype=dtype)])
    x = drawn(5, 48, dtype=torch.float64)
    assert torch.equal(ours.double()(x), both.double()(x))


class Named(nn.Module):
    """Modules behind each other, the first of which alone has parameters."""

    def __init__(self, first, *rest):
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, x):
        x = self.first(x)
        for module in self.rest:
            x = module(x)
        return x


def test_linear_names_an_activation_that_it_does_not_have():
    message = "Linear: activation must be None or one of 'relu', 'silu', 'gelu', 'gelu_tanh', got 'tanh'"
    with pytest.raises(ValueError) as error:
        lk.nn.Linear(3, 4, activation="tanh")
    assert str(error.value) == message


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_ours_where_those_are_faster(monkeypatch, bias):
    calls = []
    product = linears.ops.product
    monkeypatch.setattr(linears.ops, "product", lambda *given: calls.append(1) or product(*given))
    ours, theirs = pair("Linear", 256, 2100, bias)
    x = drawn(2, 40, 256)
    check(ours, theirs, [x], taken=False)  # by products.linear, which has no rows to choose from
    assert bool(calls) == products.faster
    with torch.no_grad():
        for few in (drawn(1, 256), drawn(2, 4, 256), drawn(256)):
            calls.clear()
            torch.testing.assert_close(ours(few), theirs(few))
            assert bool(calls) == products.faster
    calls.clear()
    for other in (drawn(2, 3, 256), x.double(), x.bfloat16()):
        torch.testing.assert_close(ours.to(other.dtype)(other), theirs.to(other.dtype)(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.float()(x), theirs.float()(x))
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("args", [("GELU",), ("GELU", "tanh"), ("SiLU",)])
def test_activations(args, dtype):
    check(*pair(*args), [drawn(3, 50, 900, dtype=dtype)])
    same(*pair(*args), drawn(500, 300).t().to(dtype))
    same(*pair(*args), drawn(500, 300, dtype=torch.float64))
    same(*pair(*args), torch.randn(()))


def test_activation_in_place_is_torchs():
    ours, theirs = pair("SiLU", inplace=True)
    x = drawn(500, 300)
    assert torch.equal(ours(y := x.clone()), theirs(x.clone()))
    assert torch.equal(y, F.silu(x))


def test_dropout():
    ours, theirs = pair("Dropout", 0.3)
    x = drawn(100, 100)
    torch.manual_seed(3)
    y = ours(x)
    torch.manual_seed(3)
    assert torch.equal(y, lk.dropout(x, 0.3))
    assert abs((y == 0).float().mean() - 0.3) < 0.05
    for module in (ours, theirs):
        assert torch.equal(module.eval()(x), x)
    same(*pair("Dropout", 0.3), x.double())
    same(*pair("Dropout", 0.0), x)
    same(*pair("Dropout", 0.3), x[:40])  # torch's is the faster one
    ours, _ = pair("Dropout", 0.3, inplace=True)
    assert ours(x) is x and (x == 0).any()


@pytest.mark.parametrize(("dtype", "padding_idx"), list(zip(DTYPES[:2], [None, -1], strict=True)))
def test_embedding(dtype, padding_idx):
    ids = torch.randint(0, 30, (4, 9))
    check(*pair("Embedding", 2**15, 128, padding_idx), [], ids, dtype=dtype)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_tables_that_are_torchs(name, options):
    ids = torch.randint(0, 30, (4, 9))
    same(*pair(name, 2**15, 128, **options), ids)
    with torch.no_grad():
        same(*pair(name, 2**15, 128), ids)
    same(*pair(name, 2**10, 32), ids)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode, dtype):
    modules = pair("EmbeddingBag", 2**15, 32, mode=mode, padding_idx=2)
    ids = torch.randint(0, 30, (4, 9))
    check(*modules, [], ids, dtype=dtype)
    check(*modules, [], ids.flatten(), torch.tensor([0, 5, 5, 20]), dtype=dtype)


def test_bags_with_weights_and_those_that_are_torchs():
    ids, weights = torch.randint(0, 30, (4, 9)), torch.rand(4, 9)
    ours, theirs = pair("EmbeddingBag", 2**15, 32, mode="sum")
    check(ours, theirs, [], ids, dtype=torch.float32, per_sample_weights=weights)
    same(*pair("EmbeddingBag", 2**15, 32, mode="max"), ids)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
            module(ids.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"weight": torch.rand(1100) + 0.5},
    ],
)
def test_cross_entropy(options, dtype):
    target = torch.randint(0, 1100, (120,))
    target[::7] = -100
    check(*pair("CrossEntropyLoss", **options), [drawn(120, 1100, dtype=dtype)], target)
    if dtype is not torch.float16:  # of which plain PyTorch's sum overflows
        options = options | {"label_smoothing": 0.1}
        check(*pair("CrossEntropyLoss", **options), [drawn(120, 1100, dtype=dtype)], target)


def test_cross_entropy_of_probabilities():
    logits, target = drawn(120, 1100), torch.rand(120, 1100).softmax(1)
    ours, theirs = pair("CrossEntropyLoss")
    assert is_ours(ours, logits, target)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    same(ours, theirs, logits, target.requires_grad_())


def test_losses_that_are_torchs():
    ours, theirs = pair("CrossEntropyLoss")
    target = torch.randint(0, 500, (4, 80))
    same(ours, theirs, drawn(4, 500, 80), target)
    same(ours, theirs, drawn(400, 500).double(), torch.arange(400))
    same(ours, theirs, drawn(5, 7), torch.arange(5))
    same(ours, theirs, drawn(1000), torch.tensor(3))


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 4}]
)
def test_linear_cross_entropy(options):
    classes = 1000 if products.faster else 2**15
    target = torch.randint(0, 8, (30,))
    check(*pair("LinearCrossEntropyLoss", 16, classes, **options), [drawn(30, 16)], target)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_linear_cross_entropy_has_its_inputs_dtype(dtype):
    ours, theirs = (m.to(dtype) for m in pair("LinearCrossEntropyLoss", 16, 2**15))
    x, target = drawn(30, 16, dtype=dtype), torch.arange(30)
    assert is_ours(ours, x, target)
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (m.float()(x.float(), target) for m in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


def test_linear_cross_entropy_that_is_torchs():
    same(*pair("LinearCrossEntropyLoss", 16, 10), drawn(30, 16), torch.randint(0, 10, (30,)))
    outs = torch.randint(0, 2**15, (3, 2))
    same(*pair("LinearCrossEntropyLoss", 4, 2**15, out_features=(2,)), drawn(3, 4), outs)
    same(*pair("LinearCrossEntropyLoss", 4, 2**15), drawn(3, 4), torch.rand(3, 2**15))
