"""What else modules of lspm_kernels.nn have in common with torch.nn's: state, copies, traces, transforms."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lspm_kernels as lk
from torch_layers import LAST, is_ours, pair, same

# Arguments, and inputs that a kernel takes in training.
MODULES = {
    "LayerNorm": ((128,), lambda: (torch.randn(600, 128),)),
    "RMSNorm": ((128,), lambda: (torch.randn(600, 128),)),
    "Linear": ((256, 300), lambda: (torch.randn(80, 256),)),
    "MultiheadAttention": ((64, 4, 0.0, True), lambda: (torch.randn(300, 64),) * 3),
    "TransformerEncoderLayer": ((64, 4, 96, 0.0), lambda: (torch.randn(300, 2, 64),)),
    "Conv2d": (
        (32, 32, 3),
        lambda: (torch.randn(2, 32, 40, 40).contiguous(memory_format=LAST),),
    ),
    "BatchNorm2d": (
        (32,),
        lambda: (torch.rand(4, 32, 40, 40).contiguous(memory_format=LAST),),
    ),
    "MaxPool2d": ((3, 2), lambda: (torch.rand(4, 32, 40, 40).contiguous(memory_format=LAST),)),
    "GELU": ((), lambda: (torch.randn(30, 40),)),
    "SiLU": ((), lambda: (torch.randn(400, 400),)),
    "Dropout": ((0.5,), lambda: (torch.randn(90, 100),)),
    "Embedding": ((2**15, 128, 3), lambda: (torch.randint(0, 9, (3, 4)),)),
    "EmbeddingBag": ((2**15, 32), lambda: (torch.randint(0, 9, (3, 4)),)),
    "CrossEntropyLoss": ((torch.ones(1100),), lambda: (torch.randn(120, 1100), torch.arange(120))),
    "LinearCrossEntropyLoss": ((8, 2**15), lambda: (torch.randn(9, 8), torch.arange(9))),
}
SOON = ["LayerNorm", "Linear", "BatchNorm2d", "TransformerEncoderLayer"]  # compiled in every run of the tests
TRACED = ["RMSNorm", "MultiheadAttention", "TransformerEncoderLayer", "Conv2d", "EmbeddingBag"]


def kwargs(name):
    return {"need_weights": False} if name == "MultiheadAttention" else {}


def call(name, module, args):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        y = module(*args, **kwargs(name))
    return y[0] if isinstance(y, tuple) else y


def test_all_modules_are_here():
    assert {*MODULES, "ConvBatchNormAct"} == set(lk.nn.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_torchs_but_for_its_forward(name):
    args, inputs = MODULES[name]
    ours, theirs = pair(name, *args)
    assert isinstance(ours, type(theirs))
    expected = inspect.signature(type(theirs).__init__).parameters
    assert list(inspect.signature(type(ours).__init__).parameters)[: len(expected)] == list(expected)
    forwards = (inspect.signature(type(each).forward).parameters for each in (ours, theirs))
    assert len({tuple((p.name, p.default) for p in parameters.values()) for parameters in forwards}) == 1
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    theirs.__class__ = type(ours)  # as accelerate makes one of the other
    x = inputs()
    assert torch.equal(call(name, theirs, x), call(name, ours, x))


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_files(name):
    args, inputs = MODULES[name]
    ours, x = pair(name, *args)[0], inputs()
    torch.save(ours, file := io.BytesIO())
    file.seek(0)
    expected = call(name, copy.deepcopy(ours), x)
    for other in (pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(other) is type(ours)
        assert torch.equal(call(name, other, x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors_and_other_kinds_are_torchs(name):
    args, inputs = MODULES[name]
    ours, x = pair(name, *args)[0], inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", lk.FallbackWarning)
        y = call(name, copy.deepcopy(ours).to("meta"), [t.to("meta") for t in x])
        assert y.is_meta and y.shape == call(name, ours, x).shape
        wide = [t.double() if t.is_floating_point() else t for t in x]
        assert call(name, copy.deepcopy(ours).double(), wide).dtype == torch.float64
        fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            assert call(name, ours, [fake.from_tensor(t) for t in x]).shape == y.shape


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "MultiheadAttention"])
def test_parametrizations(name):
    args, inputs = MODULES[name]
    ours, theirs, x = *pair(name, *args), inputs()
    weight = "in_proj_weight" if name == "MultiheadAttention" else "weight"
    ours, theirs = (parametrizations.weight_norm(m, weight) for m in (ours, theirs))
    torch.testing.assert_close(call(name, ours, x), call(name, theirs, x))
    call(name, ours, x).sum().backward()
    call(name, theirs, x).sum().backward()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-3)


COMPILED = [n if n in SOON else pytest.param(n, marks=pytest.mark.long) for n in MODULES]


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return weight + 0


WEIGHTED = "LayerNorm RMSNorm Linear MultiheadAttention Conv2d BatchNorm2d Embedding EmbeddingBag".split()


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_parametrization_is_computed_as_often_as_by_torch(name):
    """Spectral norm, for one, takes a step of its iteration each time."""
    args, inputs = MODULES[name]
    counts, x = [], inputs()
    for module in pair(name, *args):
        for part in [m for m in module.modules() if m._parameters]:
            for parameter in [n for n, p in part._parameters.items() if p is not None]:
                parametrize.register_parametrization(part, parameter, Counted())
        for training in (True, False):
            call(name, module.train(training), x)
        call(name, module.double(), [t.double() if t.is_floating_point() else t for t in x])
        counts.append([m.count for m in module.modules() if isinstance(m, Counted)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name):
    args, inputs = MODULES[name]
    ours, x = pair(name, *args)[0], inputs()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    y = call(name, compiled, x)
    if name != "Dropout":  # whose seed is drawn by another generator within a graph
        torch.testing.assert_close(y, call(name, ours, x))
    if y.requires_grad:
        y.sum().backward()


@pytest.mark.parametrize("name", TRACED)
def test_exported(name):
    args, inputs = MODULES[name]
    ours, x = pair(name, *args, train=False)[0], inputs()
    program = torch.export.export(ours, tuple(x), kwargs(name))
    with torch.no_grad():
        torch.testing.assert_close(call(name, program.module(), x), call(name, ours, x))


def test_hooks_see_each_call():
    ours, seen = lk.nn.RMSNorm(8), []
    ours.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    ours.register_full_backward_hook(lambda module, given, wanted: seen.append(len(wanted)))
    ours(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert seen == [(3, 8), 1]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_transforms_derivatives_forward_and_traces_are_torchs():
    ours, theirs = pair("RMSNorm", 8)
    x = torch.randn(5, 3, 8)
    assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))
    expected = torch.func.jvp(theirs, (x,), (x,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,))[1], expected)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent, expected)
    traced = torch.jit.trace(ours.eval(), (x,))
    assert torch.equal(traced(2 * x), theirs(2 * x))


class Marked(torch.Tensor):
    """A tensor of another class."""


def test_tensors_of_other_kinds_are_torchs():
    x = torch.randn(400, 128)
    for name in ("LayerNorm", "RMSNorm", "GELU", "Linear"):
        modules = pair(name, *((128, 128) if name == "Linear" else (128,) if name != "GELU" else ()))
        same(*modules, x.as_subclass(Marked))
        if name == "RMSNorm":  # of these torch's does not take it
            continue
        nested = torch.nested.nested_tensor([x[:3], x[3:5]])
        for actual, expected in zip(*(m(nested).unbind() for m in modules), strict=True):
            assert torch.equal(actual, expected)


def test_a_shared_module_and_functional_call():
    ours, _ = pair("LayerNorm", 128)
    x, weight = torch.randn(600, 128), torch.rand(128)
    state = {"weight": weight, "bias": torch.zeros(128)}
    torch.testing.assert_close(
        torch.func.functional_call(ours, state, (x,)), nn.functional.layer_norm(x, (128,), weight)
    )
    assert is_ours(ours, x)
