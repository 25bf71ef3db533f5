"""lspm_kernels.layers: forwards that a host module borrows, as Hugging Face's kernels puts them in place."""

import copy
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
from lspm_kernels import layers

transformers = pytest.importorskip("transformers")
LAYERS = {
    name: cls
    for name, cls in vars(layers).items()
    if inspect.isclass(cls) and cls.__module__ == layers.__name__
}
CONFIG = transformers.LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=67,
)


def activation(name):
    return transformers.activations.ACT2FN[name]


def halves(function):
    class Host(nn.Module):
        def forward(self, input):
            a, b = input.chunk(2, -1)
            return function(a) * b

    return Host()


class Head(nn.Linear):
    def forward(self, hidden, target):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.cross_entropy(super().forward(hidden).to(wide), target)


class Rotary(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def hosts():
    llama = transformers.models.llama.modeling_llama
    gelu = lambda t: F.gelu(t, approximate="tanh")  # noqa: E731
    tanh = copy.deepcopy(CONFIG)
    tanh.hidden_act = "gelu_pytorch_tanh"
    return {
        "RMSNorm": llama.LlamaRMSNorm(32),
        "LayerNorm": nn.LayerNorm(32),
        "SiluAndMul": halves(F.silu),
        "GeluAndMul": halves(F.gelu),
        "GeluTanhAndMul": halves(gelu),
        "SwiGLUMLP": llama.LlamaMLP(CONFIG),
        "GeGLUMLP": llama.LlamaMLP(tanh),
        "SiLU": activation("silu"),
        "GeLU": activation("gelu"),
        "GeluTanh": activation("gelu_pytorch_tanh"),
        "NewGELU": activation("gelu_new"),
        "FastGELU": activation("gelu_fast"),
        "LinearCrossEntropy": Head(32, 67),
        "RotaryPosEmb": Rotary(),
    }


def inputs(name):
    """The tensors with a gradient, and the others."""
    if name == "LinearCrossEntropy":
        return [torch.randn(5, 32)], [torch.randint(67, (5,))]
    if name == "RotaryPosEmb":
        angles = torch.rand(2, 5, 4)
        tables = [torch.cat([t, t], -1) for t in (angles.cos(), angles.sin())]
        return [torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)], tables
    return [torch.randn(3, 5, 32)], []


def lent(name, host):
    """A host as kernels leaves it: with the layer's forward on the object."""
    host = copy.deepcopy(host)
    host.forward = types.MethodType(LAYERS[name].forward, host)
    return host


def as_function(host, names, rest):
    """Of inputs and the host's parameters, in the dtype that these have."""

    def call(*tensors):
        given, parameters = tensors[: len(tensors) - len(names)], tensors[len(tensors) - len(names) :]
        others = [t.to(given[0].dtype) if t.is_floating_point() else t for t in rest]
        return torch.func.functional_call(host, dict(zip(names, parameters, strict=True)), (*given, *others))

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_host_gives_what_it_gave(name, dtype):
    host = hosts()[name].requires_grad_(False)
    given, rest = inputs(name)
    parameters = {n: torch.randn_like(p) for n, p in host.named_parameters()}
    tensors = [t.to(dtype) for t in (*given, *parameters.values())]
    functions = (as_function(h, list(parameters), rest) for h in (lent(name, host), host))
    oracle.check(*functions, tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_the_rules_of_kernels(name):
    """Stateless: no constructor, no members but the two marks that kernels knows, the forward's arguments."""
    layer, host = LAYERS[name], hosts()[name]
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    assert set(dir(layer)) - set(dir(nn.Module)) <= {"can_torch_compile", "has_backward"}
    mine, theirs = (inspect.signature(f).parameters.values() for f in (layer.forward, type(host).forward))
    assert [p.kind for p in mine] == [p.kind for p in theirs]
    assert [p.name for p in mine] == [p.name for p in theirs]


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary_of_either_layout(unsqueeze_dim):
    (q, k), tables = inputs("RotaryPosEmb")
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    host = hosts()["RotaryPosEmb"]
    for found, truth in zip(
        lent("RotaryPosEmb", host)(q, k, *tables, unsqueeze_dim=unsqueeze_dim),
        host(q, k, *tables, unsqueeze_dim=unsqueeze_dim),
        strict=True,
    ):
        assert torch.allclose(found, truth, atol=1e-6)


def test_a_model_of_them_compiles_whole():
    norm = lent("RMSNorm", hosts()["RMSNorm"])
    torch._dynamo.reset()
    x = torch.randn(3, 32)
    whole = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.allclose(whole(x), hosts()["RMSNorm"](x), atol=1e-6)


def test_kernels_puts_them_in_place():
    kernels = pytest.importorskip("kernels")

    class Repository:
        def __init__(self, name):
            self.name = name

        def load(self):
            return LAYERS[self.name]

    names = "RMSNorm", "SwiGLUMLP"
    model = nn.ModuleList([hosts()[name] for name in names])
    before = [module(torch.ones(2, 32)) for module in model]
    for name, module in zip(names, model, strict=True):
        kernels.replace_kernel_forward_from_hub(type(module), name)
    mapping = {name: {"cpu": Repository(name)} for name in names}
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, device="cpu", mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    for name, module, truth in zip(names, model, before, strict=True):
        assert module.forward.__func__ is LAYERS[name].forward
        assert torch.allclose(module(torch.ones(2, 32)), truth, atol=1e-6)
